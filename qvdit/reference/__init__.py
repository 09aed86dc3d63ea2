"""The shipped reference model: a drawn video world, its measurements, a pixel-space pipeline and its training."""
