"""Builds the body-part regressor from archived studies; the node never imports it."""
