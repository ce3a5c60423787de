"""auto_LiRPA 0.3, of 2022, on today's NumPy and torch.

It was made for torch before 1.13 and NumPy before 2, which have no wheels for today's Python. Three names that it uses
to read a network are gone since, and one method has an argument more; nothing in how it computes bounds is touched.
"""

import sys
import types


def import_auto_lirpa():
    """The package, after what it misses is put back."""
    import numpy
    import torch

    if "numpy.lib.arraysetops" not in sys.modules:
        try:
            import numpy.lib.arraysetops
        except ImportError:
            sys.modules["numpy.lib.arraysetops"] = types.SimpleNamespace(isin=numpy.isin)
    import torch.onnx.symbolic_helper as symbolic

    if not hasattr(symbolic, "_set_opset_version"):
        from torch.onnx._internal.torchscript_exporter._globals import GLOBALS

        symbolic._set_opset_version = lambda version: setattr(GLOBALS, "export_onnx_opset_version", version)
    if not hasattr(torch._C.Node, "__getitem__"):
        torch._C.Node.__getitem__ = lambda node, name: getattr(node, node.kindOf(name))(name)
    import auto_LiRPA

    if not hasattr(auto_LiRPA.BoundedModule, "old_named_members"):
        old = auto_LiRPA.BoundedModule.old_named_members = auto_LiRPA.BoundedModule._named_members
        auto_LiRPA.BoundedModule._named_members = lambda self, *given, remove_duplicate=True, **named: old(
            self, *given, **named
        )
    return auto_LiRPA


def margin_bounds(module, x, specification, *, lower, upper, method):
    """Lower bounds [B, S] of `specification` [B, S, C] times the outputs, over the boxes lower..upper [B, ...].

    module: a BoundedModule; method: "IBP", "CROWN-IBP" or "CROWN".
    """
    import numpy as np
    from auto_LiRPA import BoundedTensor
    from auto_LiRPA.perturbations import PerturbationLpNorm

    ball = PerturbationLpNorm(norm=np.inf, x_L=lower, x_U=upper)
    bounds, _ = module.compute_bounds(x=(BoundedTensor(x, ball),), C=specification, method=method, bound_upper=False)
    return bounds
