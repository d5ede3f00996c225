"""What is to be solved: the arguments as they were read, the ground cost, the blur, and buffers for them."""
