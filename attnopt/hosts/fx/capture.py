"""From a torch model to an ExportedProgram with its calling convention.

    nn.Module | GraphModule | ExportedProgram | path.pt2   ->   Captured(program, convention)

The model is traced in inference mode by torch.export (non-strict); its mode flags are restored and nothing of it is changed.
"""

from __future__ import annotations

import importlib
import inspect
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from attnopt.errors import InputMismatch, UnreadableModel, UntraceableModel
from attnopt.hosts.fx.caches import forms_of, our_forms, stored_classes
from attnopt.hosts.fx.call import Arguments, Convention, as_call, bind, split, traced_signature
from attnopt.hosts.fx.dynamic import enlarged, proposals
from attnopt.hosts.fx.logs import quiet
from attnopt.hosts.fx.state import with_state, writes
from attnopt.hosts.fx.trees import told


@dataclass(frozen=True)
class Captured:
    """A traced model: the program, how to call it, the user's example arguments, and which dimensions may vary.

    gone: parameters of the program that the rewritten model has no more.
    """

    program: ExportedProgram
    convention: Convention
    example: Arguments
    dynamic: str = ""
    gone: frozenset[str] = frozenset()


def capture(model: Any, example_inputs: Any = None, dynamic_shapes: Any = None) -> Captured:
    """Trace a model. Raises UntraceableModel where torch.export cannot follow it, InputMismatch, UnreadableModel."""
    if isinstance(model, (str, Path)):
        model = read_program(Path(model))
    if isinstance(model, ExportedProgram):
        return from_program(model, example_inputs)
    caches = our_forms()
    with told(caches):
        signature = inspect.signature(model.forward)
        arguments = example_arguments(model, signature, example_inputs)
        program, traced, dynamic = trace(model, signature, arguments, dynamic_shapes)
        in_spec = pytree.tree_flatten(split(signature, traced))[1]
    return Captured(program, Convention(signature, traced, in_spec, program.call_spec.out_spec, caches), arguments, dynamic)


def example_arguments(model: nn.Module, signature: inspect.Signature, example_inputs: Any) -> Arguments:
    if example_inputs is None:
        example_inputs = getattr(model, "dummy_inputs", None) or traced_examples(model)
    if example_inputs is None:
        raise InputMismatch(
            f"{type(model).__name__} does not say what its inputs look like",
            next_move="Give example_inputs: a tuple of positional or a dict of keyword arguments.",
        )
    return {name: pytree.tree_map(in_rows, value) for name, value in bind(signature, *as_call(example_inputs)).items()}


def in_rows(leaf: Any) -> Any:
    """A tensor laid out row by row: torch's ONNX exporter writes the strides of an example (a slice, a transpose) into the graph."""
    return leaf.contiguous() if isinstance(leaf, Tensor) and leaf.layout == torch.strided else leaf


def traced_examples(model: nn.Module) -> tuple[Tensor, ...] | None:
    """Zeros of the shapes that the placeholders of a GraphModule remember, where they do."""
    if not isinstance(model, torch.fx.GraphModule):
        return None
    values = [n.meta.get("val", n.meta.get("example_value")) for n in model.graph.nodes if n.op == "placeholder"]
    if not values or not all(isinstance(v, Tensor) for v in values):
        return None
    sizes = [[int(getattr(s, "node", s).hint if isinstance(s, torch.SymInt) else s) for s in v.shape] for v in values]
    return tuple(torch.zeros(size, dtype=v.dtype, device=v.device) for size, v in zip(sizes, values, strict=True))


def trace(
    model: nn.Module, signature: inspect.Signature, arguments: Arguments, dynamic_shapes: Any
) -> tuple[ExportedProgram, Arguments, str]:
    """The program, the arguments it was traced with, and which dimensions vary, from the most general proposal on.

    A model with a cache of fixed size takes the batch it was made for and no other: it is traced with the arguments as they are.
    """
    grown = enlarged(arguments)
    with inference(model):
        require_that_it_runs(model, signature, arguments)
        if dynamic_shapes is not None:
            args, kwargs = split(signature, arguments)
            return export(model, args, kwargs, as_asked(signature, dynamic_shapes)), grown, "as asked"
        attempts = [(grown, what, shapes) for what, shapes in proposals(grown)]
        if any(a is not b for a, b in zip(pytree.tree_leaves(arguments), pytree.tree_leaves(grown), strict=True)):
            attempts += [(arguments, what, shapes) for what, shapes in list(proposals(arguments))[1:]]
        failure: UntraceableModel | None = None
        for traced, what, shapes in attempts:
            args, kwargs = split(signature, traced)
            try:
                return export(model, args, kwargs, split_shapes(signature, traced, shapes)), traced, what
            except UntraceableModel as caught:
                failure = caught  # the last is that of sizes as they are, with which only the model itself can be at fault
        assert failure is not None
        raise failure


def split_shapes(signature: inspect.Signature, arguments: Arguments, shapes: dict[str, Any]) -> Any:
    """Dynamic shapes in the form that torch.export wants for these args and kwargs: a dict by parameter, *args as a tuple."""
    extra = [name for name in arguments if name not in signature.parameters]
    wanted = {name: shapes[name] for name in arguments if name not in extra}
    if extra:
        holder = next(n for n, p in signature.parameters.items() if p.kind is inspect.Parameter.VAR_KEYWORD)
        wanted[holder] = {name: shapes[name] for name in extra}
    return wanted


def as_asked(signature: inspect.Signature, dynamic_shapes: Any) -> Any:
    """The user's dynamic_shapes: a dict by parameter, or a tuple in the order of the positional inputs."""
    if isinstance(dynamic_shapes, (tuple, list)):
        return dict(zip(signature.parameters, dynamic_shapes, strict=False))
    return dynamic_shapes


def export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any) -> ExportedProgram:
    try:
        with quiet("torch._export"):
            program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as failure:
        raise UntraceableModel(
            f"torch.export cannot trace {type(model).__name__}: {first_line(failure)}",
            where=place_of(failure),
            next_move="Rewrite that line without data-dependent Python, pass other example_inputs or dynamic_shapes, or export to ONNX.",
        ) from failure
    require_that_it_is_whole(program, type(model).__name__)
    return functional(program)


def require_that_it_is_whole(program: ExportedProgram, name: str) -> None:
    """torch.export may record the inside of a vmap, which no program can run."""
    for node in program.graph.nodes:
        if "_batch_dim" in str(node.target):
            raise UntraceableModel(
                f"torch.export recorded the inside of a vmap of {name}, and that does not run",
                where=source_line(node),
                next_move="Leave out the input that makes the model build its mask by vmap, or give a 4-D attention_mask.",
            )


def source_line(node: torch.fx.Node) -> str:
    """The innermost line of the model's code that made the node."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip().startswith("File")]
    return lines[-1].rsplit("/", 1)[-1].replace('"', "") if lines else node.name


def functional(program: ExportedProgram) -> ExportedProgram:
    """The program without in-place operations: the canonical graph knows none. State that it keeps is written at its end."""
    if not any(writes(node) for node in program.graph.nodes):
        return program
    try:
        with quiet("torch._export"):
            return with_state(program).run_decompositions({})
    except Exception as failure:
        raise UntraceableModel(
            f"torch cannot make the program free of in-place operations: {first_line(failure)}",
            next_move="Register tensors that the model writes as buffers of their own, none a view of another.",
        ) from failure


def require_that_it_runs(model: nn.Module, signature: inspect.Signature, arguments: Arguments) -> None:
    """Inputs that the model itself refuses are the inputs' fault, not the tracer's."""
    copied = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, arguments)  # a cache is a new one
    args, kwargs = split(signature, copied)  # the model may add to them
    try:
        with buffers_kept(model):
            model(*args, **kwargs)
    except Exception as failure:
        raise InputMismatch(
            f"{type(model).__name__} does not run on the example inputs: {type(failure).__name__}: {first_line(failure)}",
            where=place_of(failure),
            next_move="Give example_inputs on which the model runs.",
        ) from failure


def first_line(failure: BaseException) -> str:
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    return (lines[0] if lines else type(failure).__name__)[:300]


def place_of(failure: BaseException) -> str:
    """The deepest line outside of torch: where in the user's model it stopped."""
    place, trace = "", failure.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if not any(part in code.co_filename for part in ("/torch/", "/attnopt/", "<")):
            place = f"{Path(code.co_filename).name}:{trace.tb_lineno} in {code.co_name}"
        trace = trace.tb_next
    return place


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each submodule's own flag is restored afterwards."""
    flags = {module: module.training for module in model.modules()}
    try:
        for module in flags:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, flag in flags.items():
            module.training = flag


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """What a run writes into the buffers of a model, such as a cache, is undone."""
    before = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, held in before:
            if not torch.equal(buffer, held):
                buffer.copy_(held)


def read_program(path: Path, metadata: dict[str, Any] | None = None) -> ExportedProgram:
    """The program in a .pt2 file; the values of `metadata` are filled with the extra files of these names."""
    if not path.is_file():
        raise UnreadableModel(f"there is no file '{path}'", next_move="Check the path.")
    if not zipfile.is_zipfile(path):
        raise UnreadableModel(f"'{path}' is not an exported program", next_move="Write it with torch.export.save(program, path).")
    try:
        with quiet("torch.export"):
            text = stored_text(path)
            if "transformers." in text:  # its output types are known to torch once they are imported
                importlib.import_module("transformers.modeling_outputs")
                importlib.import_module("transformers.cache_utils")
            # Its own exporters spell the names of their caches, of another form, with a colon: torch must know these already.
            forms = {} if "transformers.cache_utils:" in text else our_forms()
            with told(forms), torch.serialization.safe_globals(stored_classes()):
                return torch.export.load(path, extra_files=metadata)
    except Exception as failure:
        raise UnreadableModel(
            f"'{path}' cannot be read: {first_line(failure.__cause__ or failure)}",
            next_move="Write it with torch.export.save(program, path); what it uses from other packages must be installed.",
        ) from failure


def stored_text(path: Path) -> str:
    """The graph inside a .pt2 file, as text."""
    with zipfile.ZipFile(path) as archive:
        return "".join(archive.read(n).decode("utf-8", "replace") for n in archive.namelist() if n.endswith(".json"))


def from_program(program: ExportedProgram, example_inputs: Any) -> Captured:
    """A program brings its own tracing inputs; the user's, if given, must fit them."""
    caches = forms_of(program)
    with told(caches):
        program = functional(program)
        args, kwargs = program.example_inputs or ((), {})
        names = positional_names(program, len(args))
        arguments = dict(zip(names, args, strict=True)) | kwargs
        signature = traced_signature([(n, arguments[n], n in kwargs) for n in arguments], caches)
        in_spec = pytree.tree_flatten(split(signature, arguments))[1]
    convention = Convention(signature, arguments, in_spec, program.call_spec.out_spec, caches)
    example = arguments if example_inputs is None else bind(signature, *as_call(example_inputs))
    convention.flatten(*split(signature, example))
    return Captured(program, convention, example, "as exported")


def positional_names(program: ExportedProgram, count: int) -> list[str]:
    """Names for positional arguments: those of their first placeholders, made unique."""
    inputs = [s.arg.name for s in program.graph_signature.input_specs if s.kind.name == "USER_INPUT"]
    args, _ = program.example_inputs or ((), {})
    names, position = [], 0
    for i, arg in enumerate(args[:count]):
        leaves = len(pytree.tree_leaves(arg))
        name = inputs[position] if leaves == 1 and position < len(inputs) else f"arg_{i}"
        names.append(name if name.isidentifier() else f"arg_{i}")
        position += leaves
    return names
