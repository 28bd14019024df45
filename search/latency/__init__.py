"""What a file takes on a device: times of its kernels, measured once and kept in a table."""
