"""What an SAE is worth beyond its reconstruction: features that are known, probes, absorption, stability."""
