"""The method: calibration data → statistics → quantized, distilled model → checkpoint. Needs torch."""
