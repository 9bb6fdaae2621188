"""SHERL: features of all blocks, merged without their redundancy."""
