"""ATP (arXiv 2412.00447): the method, its trained modules, and their training."""
