"""Names that a pickle of weights may contain; all others are rejected."""

DICTS = frozenset({"collections.OrderedDict", "collections.defaultdict", "collections.Counter", "builtins.dict"})
TENSORS = frozenset({"torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"})
PARAMETERS = frozenset({"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"})
# Values that checkpoints hold in addition to weights: arguments, scores, paths. Their contents are discarded.
INERT = frozenset(
    {
        "_codecs.encode",
        "argparse.Namespace",
        "builtins.bytearray",
        "builtins.complex",
        "builtins.set",
        "builtins.slice",
        "__builtin__.set",
        "copy_reg._reconstructor",
        "copyreg._reconstructor",
        "__builtin__.object",
        "builtins.object",
        "datetime.datetime",
        "datetime.timedelta",
        "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.scalar",
        "numpy.dtype",
        "numpy.ndarray",
        "pathlib.Path",
        "pathlib.PosixPath",
        "pathlib.PurePosixPath",
        "pathlib.WindowsPath",
        "pathlib._local.PosixPath",
        "pathlib._local.WindowsPath",
        "torch.device",
        "torch.Size",
        "torch.Generator",
        "torch.serialization._get_layout",
        "types.SimpleNamespace",
    }
)
DTYPES = frozenset(
    {
        *("torch.float16", "torch.float32", "torch.float64", "torch.bfloat16", "torch.half", "torch.float"),
        *("torch.double", "torch.int8", "torch.int16", "torch.int32", "torch.int64", "torch.uint8", "torch.bool"),
    }
)
