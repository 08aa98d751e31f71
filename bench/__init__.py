"""What is measured beside the package. A package, so that no other can be taken for it."""
