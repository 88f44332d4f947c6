"""What :func:`batchnorm.surgery.convert` and :func:`batchnorm.surgery.revert` are made of.

A conversion goes through these in order: ``sources`` says what a layer is, ``policies`` makes the layer that takes its
place (with ``activated`` where an activation was fused that the new class has not), ``origin`` carries over what
belongs to the user and remembers the rest for the way back, ``optimizers`` mends parameter groups.
"""
