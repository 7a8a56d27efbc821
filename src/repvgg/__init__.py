"""RepVGG: train multi-branch, ship plain."""
