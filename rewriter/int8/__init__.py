"""What int8 does to a network: schemes and targets, annotation, calibration, and the two engines."""
