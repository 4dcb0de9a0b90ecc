"""From a folder of images and masks to a model folder: cases, split, training, quality, card."""
