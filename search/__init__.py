"""Many candidate rewrites of one network: score them, choose among them, report and ship."""
