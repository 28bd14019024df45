"""``model_int8.onnx.md`` and its like: what the file beside it reads and returns, and how it is loaded."""

from __future__ import annotations

from typing import Any

from torch import fx

from rewriter import Quantized
from rewriter.graph import output_nodes
from rewriter.int8 import annotation
from search.engines import Engine
from search.scoring.evaluator import RewriteEvaluator

_ONNX_CPP = """Ort::Env env;
Ort::Session session(env, "{file}", Ort::SessionOptions{{}});
auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
auto input = Ort::Value::CreateTensor<float>(memory, data, count, shape, rank);
auto outputs = session.Run({{}}, names, &input, 1, output_names, output_count);"""
_SNIPPETS: dict[str, list[tuple[str, str, str]]] = {
    "onnx": [
        (
            "Python",
            "python",
            """import onnxruntime
session = onnxruntime.InferenceSession("{file}", providers=["CPUExecutionProvider"])
name = session.get_inputs()[0].name
outputs = session.run(None, {{name: images}})  # float32 {shape}""",
        ),
        ("C++", "cpp", _ONNX_CPP),
    ],
    "openvino": [
        (
            "Python",
            "python",
            """import openvino
core = openvino.Core()
settings = {{"INFERENCE_PRECISION_HINT": "f32"}}  # what is not int8 stays float32
network = core.compile_model("{file}", "CPU", settings)
outputs = network(images).to_tuple()  # float32 {shape}""",
        ),
        (
            "C++",
            "cpp",
            """ov::Core core;
auto network = core.compile_model("{file}", "CPU", ov::hint::inference_precision(ov::element::f32));
auto request = network.create_infer_request();
request.set_input_tensor(images);
request.infer();""",
        ),
    ],
    "tflite": [
        (
            "Python",
            "python",
            """from ai_edge_litert.interpreter import Interpreter
interpreter = Interpreter("{file}")
interpreter.allocate_tensors()
interpreter.set_tensor(interpreter.get_input_details()[0]["index"], images)  # float32 {shape}
interpreter.invoke()
outputs = [interpreter.get_tensor(d["index"]) for d in interpreter.get_output_details()]""",
        ),
        (
            "Kotlin",
            "kotlin",
            """val interpreter = Interpreter(File("{file}"))
val images = ByteBuffer.allocateDirect({count} * 4).order(ByteOrder.nativeOrder())
val outputs = mutableMapOf<Int, Any>(0 to FloatBuffer.allocate({output_count}))
interpreter.runForMultipleInputsOutputs(arrayOf<Any>(images), outputs)""",
        ),
        (
            "C++",
            "cpp",
            """auto model = tflite::FlatBufferModel::BuildFromFile("{file}");
tflite::ops::builtin::BuiltinOpResolver resolver;
std::unique_ptr<tflite::Interpreter> interpreter;
tflite::InterpreterBuilder(*model, resolver)(&interpreter);
interpreter->AllocateTensors();  // typed_input_tensor<float>(0), Invoke(), typed_output_tensor<float>(0)""",
        ),
    ],
    "trt": [
        (
            "Shell",
            "sh",
            """trtexec --onnx={file} --int8 --fp16 --shapes={name}:{dashed} --saveEngine=model.engine""",
        )
    ],
}


def model_card(
    evaluator: RewriteEvaluator, quantized: Quantized, engine: Engine, written: Any
) -> str:
    """The text of the page."""
    gm, score = quantized.gm, written.score
    inputs = list(gm.graph.find_nodes(op="placeholder"))
    returned = output_nodes(gm)
    (form,) = [engine.form]
    lines = [
        f"# {written.file.name}",
        "",
        f"Int8 network for {engine.name}, target `{written.target}`, {written.size / 1e6:.2f} MB.",
        "",
        "| | shape | type | in int8: scale, zero point | calibration saw |",
        "|---|---|---|---|---|",
        *(_row("input", quantized, n, form) for n in inputs),
        *(_row("output", quantized, n, form) for n in returned),
        "",
        _layout(form),
        "Inputs are preprocessed as those of the run's calibration data; the last column is the range that they had.",
        "",
        "## Measured",
        "",
        f"With {written.engine} {score.engine_version} on {score.samples} samples: "
        f"{evaluator.task.metric} {_number(score.metric)} (float {_number(score.original)}), damage "
        f"{_number(score.damage)}; {written.latency_ms:.3g} ms for one input on the machine that exported it.",
    ]
    if written.engine != engine.name:
        lines += ["", f"{engine.missing()}. {written.engine} ran it instead."]
    if written.findings:
        lines += ["", "## Before deployment", ""]
        lines += [f"- `{f.code}` {f.node}: {f.message}" for f in written.findings]
    first = _stored(inputs[0], form)
    facts = {
        "file": written.file.name,
        "shape": f"({', '.join(map(str, first))})",
        "count": _count(first),
        "output_count": _count(_stored(returned[0], form)),
        "name": inputs[0].name,
        "dashed": "x".join(map(str, (1, *first[1:]))),
    }
    for title, language, text in _SNIPPETS.get(form, []):
        lines += ["", f"## {title}", "", f"```{language}", text.format(**facts), "```"]
    return "\n".join([*lines, ""])


def _layout(form: str) -> str:
    if form == "tflite":
        return "Four dimensions are (batch, height, width, channels), and the batch is 1."
    return "Four dimensions are (batch, channels, height, width); the batch is free."


def _stored(node: fx.Node, form: str) -> tuple[Any, ...]:
    shape = tuple(node.meta["shape"])
    if form == "tflite":
        return (shape[0], *shape[2:], shape[1]) if len(shape) == 4 else shape
    return ("N", *shape[1:]) if shape else shape


def _count(shape: tuple[Any, ...]) -> int:
    total = 1
    for size in shape:
        total *= size if isinstance(size, int) else 1
    return total


def _row(kind: str, quantized: Quantized, node: fx.Node, form: str) -> str:
    params, seen = "", ""
    note = annotation(node)
    if note.output is not None and note.range_of in quantized.calibration.values:
        scale, zero = quantized.value_params(node)
        params = f"{scale:.9g}, {zero}"
    stats = quantized.calibration.stats.get(node.name)
    if stats is not None:
        seen = f"{stats.low:.4g} to {stats.high:.4g}"
    shape = "x".join(map(str, _stored(node, form)))
    return f"| {kind} `{node.name}` | {shape} | float32 | {params} | {seen} |"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"
