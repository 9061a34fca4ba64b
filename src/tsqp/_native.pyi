def best() -> int: ...
def multiply(x: int, panels: int, y: int, rows: int, inputs: int, outputs: int, isa: int, threads: int, /) -> None: ...
def multiply_floats(
    x: int,
    panels: int,
    bias: int,
    y: int,
    shape: tuple[int, int, int],
    rows_apart: tuple[int, int],
    isa: int,
    threads: int,
    /,
) -> None: ...
def quantize(x: int, factor: float, xq: int, scale: int, rows: int, inputs: int, isa: int, threads: int, /) -> int: ...
def dequantize(
    y: int,
    row_scale: int,
    column_scale: int,
    bias: int,
    out: int,
    rows: int,
    outputs: int,
    isa: int,
    threads: int,
    /,
) -> None: ...
def dots(
    words: int,
    masks: int,
    out: int,
    limbs: int,
    result: int,
    row_scale: int,
    column_scale: int,
    bias: int,
    rows: int,
    length: int,
    isa: int,
    threads: int,
    /,
) -> None: ...
def attend(
    q: int,
    k: int,
    v: int,
    out: int,
    sizes: tuple[int, ...],
    q_strides: tuple[int, ...],
    k_strides: tuple[int, ...],
    v_strides: tuple[int, ...],
    threads: int,
    /,
) -> None: ...
def attend_paged(
    q: int,
    pool: int,
    spans: int,
    tables: int,
    out: int,
    sizes: tuple[int, ...],
    q_strides: tuple[int, ...],
    block_stride: int,
    threads: int,
    /,
) -> None: ...
def keep(
    qkv: int,
    cosine: int,
    sine: int,
    pool: int,
    spans: int,
    tables: int,
    sizes: tuple[int, ...],
    row: int,
    block: int,
    isa: int,
    threads: int,
    /,
) -> None: ...
def rms_norm(
    x: int,
    added: int,
    total: int,
    weight: int,
    eps: float,
    out: int,
    sizes: tuple[int, int],
    strides: tuple[int, int],
    isa: int,
    threads: int,
    /,
) -> None: ...
def swiglu(gate_up: int, out: int, rows: int, size: int, isa: int, threads: int, /) -> None: ...
def rotate(
    x: int,
    cosine: int,
    sine: int,
    out: int,
    sizes: tuple[int, ...],
    x_strides: tuple[int, ...],
    out_strides: tuple[int, ...],
    isa: int,
    threads: int,
    /,
) -> None: ...
def draw(
    x: int,
    count: int,
    largest: float,
    scale: float,
    top_k: int,
    top_p: float,
    min_p: float,
    uniform: float,
    isa: int,
    /,
) -> int: ...
def watch(descriptors: tuple[int, ...], limit_ns: int, ahead: int, size: int, /) -> tuple[int, list[int]]: ...
def core() -> int: ...
