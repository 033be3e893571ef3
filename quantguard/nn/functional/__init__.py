"""The staircase as a pure function of tensors.

``staircase.py`` has the quantizer ``q``, its softened form and the gradient modes. It runs
the autograd functions of ``autograd_functions.py``, whose passes over memory exist twice and give
the same bits: ``compiled_kernels.py`` (with ``kernel_bodies.py``) and ``eager_kernels.py``
(with ``memory_blocks.py``, ``level_search.py`` and ``per_channel.py``). ``reference.py`` has the
function in plain operations, for compilers and exporters. ``surrogates.py`` places the windows.

To add a gradient mode: name it in ``staircase.MODES``, set its slopes in
``surrogates.slope_tables`` and ``reference.windowed``, and add its closed form to
``tests/nn/functional/test_staircase_gradients.py``.
"""
