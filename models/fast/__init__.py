"""The networks: cells stacked for image classification, the supernet, and the GAN that writes cells."""
