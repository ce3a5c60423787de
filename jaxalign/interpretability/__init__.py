"""Opening networks up: activations, sparse autoencoders, circuits, attribution, feature visualisation."""
