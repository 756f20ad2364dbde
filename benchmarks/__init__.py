"""What the product's speed and memory are measured by. Nothing here is imported by the package."""
