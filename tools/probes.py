"""What is wrong in an engine's source, fault by fault: this is what a cell of compat_matrix.yaml claims.

Each fault of the table has a probe: the function with the fault's id as its name. It says yes when it sees the
fault, no when it sees the fix, and raises `Unknown` when it sees neither: then a person has to read the engine.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator

from mmlane.engine.source import EngineSource, signature_of
from tools.steps import Function, Step, steps, steps_in

MM_UTILS = "sglang.srt.managers.mm_utils"
TOKENIZER = "sglang.srt.managers.tokenizer_manager"
REQUESTS = "sglang.srt.managers.io_struct"
ENGINE = "sglang.srt.entrypoints.engine"
CUDA_IPC = "sglang.srt.utils.cuda_ipc_transport_utils"
LEASES = "sglang.srt.multimodal.transport.cuda_ipc"  # from 0.5.18 in its place
LEASED_POOL = "sglang.srt.multimodal.transport.memory_pool"
PROCESSORS = "sglang.srt.multimodal.processors.base_processor"
ENVIRON = "sglang.srt.environ"
BATCHES = "sglang.srt.managers.schedule_batch"
TRANSPORT = "sglang.srt.multimodal.transport"  # from 0.5.19 on this has the decision
# Where requests are received: from 0.5.13, and before.
RECEIVERS = (
    ("sglang.srt.managers.scheduler_components.request_receiver", "SchedulerRequestReceiver"),
    ("sglang.srt.managers.scheduler", "Scheduler"),
)

# Where pointers are made; the latter two exist from 0.5.13 and 0.5.16.
WRAPPERS = ("wrap_shm_features", "_wrap_tensor_or_list", "_wrap_shm_or_inline")


class Unknown(Exception):
    """Neither the fault nor its fix was found; the message says what was looked for."""


Probe = Callable[[EngineSource], bool]
PROBES: dict[str, dict[str, Probe]] = {}


def fault_of(patch: str) -> Callable[[Probe], Probe]:
    """Makes a function the probe of the fault that has its name, in the row of that patch."""

    def add(probe: Probe) -> Probe:
        PROBES.setdefault(patch, {})[probe.__name__] = probe
        return probe

    return add


def faults(source: EngineSource, patch: str) -> list[str]:
    """The ids of the faults that this engine has, among those that the patch fixes. Raises `Unknown`."""
    return [id for id, probe in PROBES.get(patch, {}).items() if probe(source)]


# --- shm_pointer: the class, and who survives a lost segment -----------------------------------------------

# All that the constructor calls while it does not reserve its pages. Another name might reserve them.
_PLAIN_COPY = (
    {"SharedMemory", "make_shm_name", "close", "unlink", "cpu", "contiguous", "is_contiguous", "copy_", "view"}
    | {"element_size", "numel", "frombuffer", "ndarray", "numpy", "flatten", "reshape"}
)  # fmt: skip


@fault_of("shm_pointer")
def unlinks_in_setstate(source: EngineSource) -> bool:
    if "unlink" in _names(_pointer(source, "__setstate__")):
        return True
    _found("unlink" in _names(_pointer(source, "materialize")), "no unlink in __setstate__ or materialize")
    return False


@fault_of("shm_pointer")
def clones_on_receipt(source: EngineSource) -> bool:
    made = _pointer(source, "materialize", otherwise="__setstate__")
    if any(step.name == "mmap" and (step.keyword("access") or "").endswith("ACCESS_COPY") for step in made):
        return False
    _found("clone" in _names(made), "neither a copy-on-write mapping nor a clone in materialize")
    return True


@fault_of("shm_pointer")
def sigbus_on_full_shm(source: EngineSource) -> bool:
    made = _names(_pointer(source, "__init__"))
    _found("SharedMemory" in made, "no SharedMemory in __init__")
    if "posix_fallocate" in made:
        before_copy = "copy_" in made and made.index("posix_fallocate") < made.index("copy_")
        _found(before_copy, "posix_fallocate in __init__, but not before copy_")
        return False
    _found(set(made) <= _PLAIN_COPY, f"unfamiliar calls in __init__: {set(made) - _PLAIN_COPY}")
    return True


@fault_of("shm_pointer")
def full_shm_fails_request(source: EngineSource) -> bool:
    wrappers = [source.find(MM_UTILS, name) for name in WRAPPERS]
    made = [step for node in wrappers if isinstance(node, Function) for step in steps(node)]
    makers = [step for step in made if step.name == "ShmPointerMMData"]
    return not _every([step.caught("OSError") for step in makers], "place where pointers are made")


@fault_of("shm_pointer")
def embeddings_inline(source: EngineSource) -> bool:
    wrap = _need(source, MM_UTILS, "wrap_shm_features")
    read = {node.attr for node in ast.walk(wrap) if isinstance(node, ast.Attribute)}
    _found("feature" in read, "wrap_shm_features does not read `feature`")
    return "precomputed_embeddings" not in read


@fault_of("shm_pointer")
def raises_in_setstate(source: EngineSource) -> bool:
    opened = [step for step in _pointer(source, "__setstate__") if step.name == "SharedMemory"]
    if not opened:
        _found("SharedMemory" in _names(_pointer(source, "materialize")), "no SharedMemory in __setstate__")
        return False
    return not _every([step.caught() for step in opened], "place where segments are opened")


@fault_of("shm_pointer")
def lost_segment_ends_server(source: EngineSource) -> bool:
    received = _received(source)
    unwraps = [step for step in received if step.name == "unwrap_shm_features"]
    if not _every([step.caught() for step in unwraps], "unwrap_shm_features in recv_requests"):
        return True
    agreed = _names(received[received.index(unwraps[-1]) :])
    _found("all_reduce" in agreed, "failures are caught, but no all_reduce tells the other ranks")
    return False


def _pointer(source: EngineSource, method: str, otherwise: str | None = None) -> tuple[Step, ...]:
    owner = source.find(MM_UTILS, "ShmPointerMMData")
    function = source.find(MM_UTILS, f"ShmPointerMMData.{method}")
    if function is None and otherwise is not None:
        return _pointer(source, otherwise)
    if not isinstance(owner, ast.ClassDef) or not isinstance(function, Function):
        raise Unknown(f"no ShmPointerMMData.{method}")
    return steps(function, owner)


# --- deferred_unwrap, tp_barrier: the order of things in the receiver --------------------------------------


@fault_of("deferred_unwrap")
def unwraps_before_broadcast(source: EngineSource) -> bool:
    broadcasts, unwraps = _exchange(source)
    if max(unwraps) < min(broadcasts):
        return True
    _found(max(broadcasts) < min(unwraps), "unwrap_shm_features both before and after a broadcast")
    return False


@fault_of("tp_barrier")
def no_barrier(source: EngineSource) -> bool:
    return not _barrier_groups(source)


@fault_of("tp_barrier")
def barrier_on_tp_only(source: EngineSource) -> bool:
    return _barrier_groups(source) == {"tp"}


def _barrier_groups(source: EngineSource) -> set[str]:
    """The kinds of group that wait for each other between the last broadcast and the first unwrap."""
    received = _received(source)
    broadcasts, unwraps = _exchange(source)
    groups = set()
    for i, step in enumerate(received):
        if step.name == "barrier":
            _found(max(broadcasts) < i < min(unwraps), "a barrier, but not between broadcast and unwrap")
            group = step.keyword("group") or ""
            groups.add(next((kind for kind in ("attn_tp", "attn_cp", "tp") if kind in group), group))
    known = groups in (set(), {"tp"}, {"tp", "attn_tp", "attn_cp"})
    _found(known, f"barriers on unfamiliar groups: {sorted(groups)}")
    between = received[max(broadcasts) + 1 : min(unwraps)]
    strange = [step.name for step in between if step.name != "barrier" and step.keyword("group")]
    _found(bool(groups) or not strange, f"no barrier, but {strange}")
    return groups


def _exchange(source: EngineSource) -> tuple[list[int], list[int]]:
    """At which steps of receiving requests are broadcast, and at which unwrapped."""
    names = _names(_received(source))
    broadcasts = [i for i, name in enumerate(names) if name.endswith("broadcast_pyobj")]
    unwraps = [i for i, name in enumerate(names) if name == "unwrap_shm_features"]
    _found(bool(broadcasts and unwraps), "no broadcast_pyobj, or no unwrap_shm_features, in recv_requests")
    return broadcasts, unwraps


def _received(source: EngineSource) -> tuple[Step, ...]:
    for module, name in RECEIVERS:
        owner = source.find(module, name)
        function = source.find(module, f"{name}.recv_requests")
        if isinstance(owner, ast.ClassDef) and isinstance(function, Function):
            return steps(function, owner)
    raise Unknown("no recv_requests in the scheduler's receiver")


# --- fan_out, fan_out_images: n > 1 ------------------------------------------------------------------------


@fault_of("fan_out")
def shares_items(source: EngineSource) -> bool:
    function = _need(source, TOKENIZER, "TokenizerManager._handle_batch_request")
    loops = [node.body for node in ast.walk(function) if isinstance(node, ast.For)]
    owned = [owns for body in loops for owns in _sent_copies(body)]
    return not _every(owned, "copied request that is sent")


def _sent_copies(loop: list[ast.stmt]) -> Iterator[bool]:
    """For each request that this loop copies and sends: whether it gets its own items in between."""
    copied: dict[str, int] = {}
    for i, statement in enumerate(loop):
        if isinstance(statement, ast.Assign) and ast.unparse(statement.value).startswith("copy.copy("):
            copied.update({ast.unparse(target): i for target in statement.targets})
        for step in steps_in([] if isinstance(statement, ast.For) else [statement]):
            # 0.5.9 sends the request, then its tokenized form; later releases the latter alone.
            sent = [word for word in map(ast.unparse, step.call.args) if word in copied]
            if step.name == "_send_one_request" and sent:
                yield _owns_items(sent[-1], loop[copied[sent[-1]] + 1 : i])


def _owns_items(request: str, prepared: list[ast.stmt]) -> bool:
    targets = {
        ast.unparse(t) for s in prepared for n in ast.walk(s) if isinstance(n, ast.Assign) for t in n.targets
    }
    if f"{request}.mm_inputs.mm_items" in targets:
        return True
    given = {step.name for step in steps_in(prepared) if request in map(ast.unparse, step.call.args)}
    _found(
        given <= {"hasattr", "getattr", "isinstance"},
        f"{request} is given to {sorted(given)} before it is sent",
    )
    return False


@fault_of("fan_out_images")
def images_as_batch(source: EngineSource) -> bool:
    if not _flat(source, "image_data"):
        return False
    counted = (
        node
        for node in ast.walk(_need(source, REQUESTS, "GenerateReqInput._normalize_image_data"))
        if isinstance(node, ast.If) and ast.unparse(node.test) == "len(self.image_data) != self.batch_size"
    )
    _found(any(isinstance(s, ast.Raise) for node in counted for s in node.body), "no refusal by number of images")
    return True


@fault_of("fan_out_images")
def videos_cut(source: EngineSource) -> bool:
    fields = ("video_data", "audio_data")
    for field in fields:
        normalized = _need(source, REQUESTS, f"GenerateReqInput._normalize_{field}")
        repeated = f"self.{field} = self.{field} * self.parallel_sample_num"
        _found(repeated in ast.unparse(normalized), f"the list of {field} is not repeated as it is")
    return any(_flat(source, field) for field in fields)


def _flat(source: EngineSource, field: str) -> bool:
    """Whether a list of inputs stays as it is while the one prompt beside it is made a batch of one."""
    request = _need(source, REQUESTS, "GenerateReqInput")
    assigned = {ast.unparse(node) for node in ast.walk(request) if isinstance(node, ast.Assign)}
    _found("self.text = [self.text]" in assigned, "the prompt of n > 1 is not made a batch of one")
    return f"self.{field} = [self.{field}]" not in assigned


# --- one_node, inline_views: what is pickled inside of a request --------------------------------------------


@fault_of("one_node")
def address_means_nodes(source: EngineSource) -> bool:
    older = (source.find(TOKENIZER, f"{private}determine_tensor_transport_mode") for private in ("", "_"))
    decides = next((node for node in older if isinstance(node, Function)), None)
    if decides is not None:
        _found("dist_init_addr" in ast.unparse(decides), "the tokenizer decides, but not by the address")
        return True
    newer = _need(source, TRANSPORT, "determine_tensor_transport_mode")
    _found("nnodes > 1" in ast.unparse(newer), "neither the address nor the number of nodes decides")
    return False


@fault_of("inline_views")
def whole_storage(source: EngineSource) -> bool:
    _found("value[start:end]" in ast.unparse(_need(source, MM_UTILS, "_slice_value")), "an image is no slice")
    wrapping = [node for name in WRAPPERS if (node := source.find(MM_UTILS, name)) is not None]
    copies = {name for node in wrapping if isinstance(node, Function) for name in _names(steps(node))}
    return not copies & {"clone", "contiguous"}


@fault_of("inline_views")
def splits_in_tokenizer(source: EngineSource) -> bool:
    """0.5.9 does so in its ranks, in `MultimodalInputs.from_dict`."""
    there = {
        module: "get_new_expanded_mm_items(" in file.read_text(encoding="utf-8")
        for module in (PROCESSORS, BATCHES)
        if (file := source.file(module)) is not None
    }
    _found(any(there.values()), "no module splits the images of a request")
    return there[PROCESSORS]


# --- shm_sweep: what a launch does before it starts processes ----------------------------------------------


@fault_of("shm_sweep")
def no_sweep(source: EngineSource) -> bool:
    """From 0.5.15 on there is `stale_shm_cleanup`, for the engine's own CI and by pid alone: nothing calls it."""
    homes = (source.find(ENGINE, "_launch_subprocesses"), source.find(ENGINE, "Engine._launch_subprocesses"))
    launches = [_names(steps(node)) for node in homes if isinstance(node, Function)]
    _found(len(launches) == 1, f"{len(launches)} functions _launch_subprocesses")
    configure = _need(source, ENGINE, "_set_envs_and_config")
    assert isinstance(configure, Function)
    before, _, _ = " ".join(launches[0]).partition("_launch_scheduler_processes")
    _found("_set_envs_and_config" in before, "processes are started before _set_envs_and_config")
    made = [*launches[0], *_names(steps(configure))]
    sweeping = [name for name in made if re.search("shm|stale|leftover|sweep", name)]
    _found(not sweeping, f"the launch calls {sweeping}")
    return True


# --- ipc_redirect, ipc_pool_budget, ipc_lock: features that travel as CUDA IPC handles ----------------------

_OPENERS = {"_new_shared_cuda", "_pool_handle_cache_get_or_open", "_open_pooled_storage_uncached"}
_READER = "rebuild_device_idx"


@fault_of("ipc_redirect")
def opens_on_producer(source: EngineSource) -> bool:
    owner, received = _reconstructed(source)
    values = _assigned(owner)
    opened = [ast.unparse(step.call.args[-1]).lstrip("*") for step in received if step.name in _OPENERS]
    handles = {values.get(name, name) for name in opened}
    _found(bool(handles), "no handle is opened in reconstruct_on_target_device")
    as_shared = {handle for handle in handles if re.fullmatch(r"ipc_extra\['(pool_)?handle'\]", handle)}
    strange = {handle for handle in handles - as_shared if not handle.startswith(f"({_READER},) + ")}
    _found(not strange, f"a handle is opened that is made in an unfamiliar way: {sorted(strange)}")
    return bool(as_shared)


@fault_of("ipc_redirect")
def guards_producer(source: EngineSource) -> bool:
    _, received = _reconstructed(source)
    devices = {ast.unparse(step.call.args[0]) for step in received if _is_call_of(step, "torch.device")}
    producers = {device for device in devices if "device_index" in device}
    strange = {device for device in devices - producers if _READER not in device}
    _found(bool(devices) and not strange, f"unfamiliar devices: {sorted(strange)}")
    return bool(producers)


@fault_of("ipc_pool_budget")
def whole_pool_each(source: EngineSource) -> bool:
    init = _need(source, PROCESSORS, "BaseMultimodalProcessor.__init__")
    assert isinstance(init, Function)
    made = [step for step in steps(init) if step.name == "MmItemMemoryPool"]
    _found(len(made) == 1, f"{len(made)} pools are made")
    name = ast.unparse(made[0].call.args[0])
    size = _assigned(init).get(name, name)
    whole = size == "MM_FEATURE_CACHE_SIZE"
    _found(whole or "worker_num" in size, f"a pool has an unfamiliar size: {size}")
    return whole


@fault_of("ipc_pool_budget")
def four_gib(source: EngineSource) -> bool:
    default = signature_of(_need(source, ENVIRON, "Envs.SGLANG_MM_FEATURE_CACHE_MB"))
    four, one = "EnvInt(4 * 1024)", "EnvInt(1 * 1024)"
    _found(default in (four, one), f"an unfamiliar default: {default}")
    return default == four


@fault_of("ipc_pool_budget")
def silent_when_full(source: EngineSource) -> bool:
    owner = source.find(CUDA_IPC, "MmItemMemoryPool") or source.find(LEASES, "MmItemMemoryPool")
    if not isinstance(owner, ast.ClassDef):
        raise Unknown("no MmItemMemoryPool")
    givers = ("return_a_slice_tensor_with_flag", "wrap_tensor")
    given = [steps(node, owner) for node in owner.body if isinstance(node, Function) and node.name in givers]
    _found(len(given) == 1, f"not one of {givers} in MmItemMemoryPool")
    made = _names(given[0])
    _found("get_available_chunk" in made or "copy_tensor" in made, f"no room is looked for in {made}")
    return "warning" not in made


@fault_of("ipc_lock")
def lock_in_tmp(source: EngineSource) -> bool:
    owner, _ = _reconstructed(source)
    constant = source.find(CUDA_IPC, "SHM_LOCK_FILE")
    if constant is None:
        homes = [source.file(module) for module in (CUDA_IPC, LEASES, LEASED_POOL)]
        texts = [file.read_text(encoding="utf-8") for file in homes if file is not None]
        _found(not any("flock" in text for text in texts), "no SHM_LOCK_FILE, but a lock on a file")
        return False
    opened = [step for node in owner.body if isinstance(node, Function) for step in steps(node)]
    emptied = [step for step in opened if ast.unparse(step.call) == "open(SHM_LOCK_FILE, 'w+')"]
    _found(bool(emptied), "SHM_LOCK_FILE, but no code opens it as 'w+'")
    path = signature_of(constant)
    _found(path.startswith("'/tmp/"), f"a lock file at an unfamiliar place: {path}")
    return True


def _reconstructed(source: EngineSource) -> tuple[ast.ClassDef, tuple[Step, ...]]:
    """The proxy of a tensor, and the steps by which a rank gets the tensor."""
    name = "CudaIpcTensorTransportProxy"
    for module in (CUDA_IPC, LEASES):
        owner = source.find(module, name)
        function = source.find(module, f"{name}.reconstruct_on_target_device")
        if isinstance(owner, ast.ClassDef) and isinstance(function, Function):
            return owner, steps(function, owner)
    raise Unknown(f"no {name}.reconstruct_on_target_device")


def _assigned(node: ast.AST) -> dict[str, str]:
    """What each name is given in a body, the last time."""
    found = {}
    for assignment in (inner for inner in ast.walk(node) if isinstance(inner, ast.Assign)):
        (target, *_), value = assignment.targets, assignment.value
        pairs = [(target, value)]
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            pairs = list(zip(target.elts, value.elts, strict=True))
        found.update({ast.unparse(name): ast.unparse(given) for name, given in pairs})
    return found


def _is_call_of(step: Step, dotted: str) -> bool:
    return ast.unparse(step.call.func) == dotted


# --- lane: how each feature travels ------------------------------------------------------------------------


@fault_of("lane")
def a_segment_each(source: EngineSource) -> bool:
    _found("SharedMemory" in _names(_pointer(source, "__init__")), "no SharedMemory in __init__")
    return True


# --- reading -----------------------------------------------------------------------------------------------


def _found(evidence: bool, otherwise: str) -> None:
    if not evidence:
        raise Unknown(otherwise)


def _need(source: EngineSource, module: str, name: str) -> ast.AST:
    node = source.find(module, name)
    if node is None:
        raise Unknown(f"no {module}.{name}")
    return node


def _every(answers: list[bool], what: str) -> bool:
    _found(bool(answers), f"found no {what}")
    return all(answers)


def _names(of: tuple[Step, ...]) -> list[str]:
    return [step.name for step in of]
