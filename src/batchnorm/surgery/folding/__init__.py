"""What :func:`batchnorm.surgery.fold` is made of: the algebra, who can take a batch norm up, which channels meet."""
