"""What our kernels are measured against, a file for each family; none of them is required."""
