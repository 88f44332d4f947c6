"""What runs on the device: Triton functions, without a tensor's shape or a launch. Imported on first use only."""
