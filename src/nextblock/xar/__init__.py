"""xAR: generate images by denoising the next entity."""
