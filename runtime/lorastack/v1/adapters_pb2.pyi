import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from lorastack.v1 import generation_pb2 as _generation_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Adapter(_message.Message):
    __slots__ = ("id", "digest", "revision", "kind", "base_model", "compatible", "rank", "alpha", "target_modules", "num_heads", "num_layers", "medusa_version", "size_bytes", "created_at", "residency", "pinned", "device_bytes", "in_flight", "last_used_at", "warnings", "alias_loras", "alias_medusa_id", "shared_heads_id", "shared_heads_sha256", "private_rank")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[Adapter.Kind]
        LORA: _ClassVar[Adapter.Kind]
        MEDUSA: _ClassVar[Adapter.Kind]
        LORA_WITH_MEDUSA: _ClassVar[Adapter.Kind]
        ALIAS: _ClassVar[Adapter.Kind]
    KIND_UNSPECIFIED: Adapter.Kind
    LORA: Adapter.Kind
    MEDUSA: Adapter.Kind
    LORA_WITH_MEDUSA: Adapter.Kind
    ALIAS: Adapter.Kind
    class Residency(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        RESIDENCY_UNSPECIFIED: _ClassVar[Adapter.Residency]
        DISK: _ClassVar[Adapter.Residency]
        HOST: _ClassVar[Adapter.Residency]
        DEVICE: _ClassVar[Adapter.Residency]
    RESIDENCY_UNSPECIFIED: Adapter.Residency
    DISK: Adapter.Residency
    HOST: Adapter.Residency
    DEVICE: Adapter.Residency
    ID_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    COMPATIBLE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    TARGET_MODULES_FIELD_NUMBER: _ClassVar[int]
    NUM_HEADS_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    MEDUSA_VERSION_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    RESIDENCY_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BYTES_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    LAST_USED_AT_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    ALIAS_LORAS_FIELD_NUMBER: _ClassVar[int]
    ALIAS_MEDUSA_ID_FIELD_NUMBER: _ClassVar[int]
    SHARED_HEADS_ID_FIELD_NUMBER: _ClassVar[int]
    SHARED_HEADS_SHA256_FIELD_NUMBER: _ClassVar[int]
    PRIVATE_RANK_FIELD_NUMBER: _ClassVar[int]
    id: str
    digest: str
    revision: int
    kind: Adapter.Kind
    base_model: str
    compatible: bool
    rank: int
    alpha: float
    target_modules: _containers.RepeatedScalarFieldContainer[str]
    num_heads: int
    num_layers: int
    medusa_version: int
    size_bytes: int
    created_at: _timestamp_pb2.Timestamp
    residency: Adapter.Residency
    pinned: bool
    device_bytes: int
    in_flight: int
    last_used_at: _timestamp_pb2.Timestamp
    warnings: _containers.RepeatedScalarFieldContainer[str]
    alias_loras: _containers.RepeatedCompositeFieldContainer[_generation_pb2.LoraRef]
    alias_medusa_id: str
    shared_heads_id: str
    shared_heads_sha256: str
    private_rank: int
    def __init__(self, id: _Optional[str] = ..., digest: _Optional[str] = ..., revision: _Optional[int] = ..., kind: _Optional[_Union[Adapter.Kind, str]] = ..., base_model: _Optional[str] = ..., compatible: _Optional[bool] = ..., rank: _Optional[int] = ..., alpha: _Optional[float] = ..., target_modules: _Optional[_Iterable[str]] = ..., num_heads: _Optional[int] = ..., num_layers: _Optional[int] = ..., medusa_version: _Optional[int] = ..., size_bytes: _Optional[int] = ..., created_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., residency: _Optional[_Union[Adapter.Residency, str]] = ..., pinned: _Optional[bool] = ..., device_bytes: _Optional[int] = ..., in_flight: _Optional[int] = ..., last_used_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., warnings: _Optional[_Iterable[str]] = ..., alias_loras: _Optional[_Iterable[_Union[_generation_pb2.LoraRef, _Mapping]]] = ..., alias_medusa_id: _Optional[str] = ..., shared_heads_id: _Optional[str] = ..., shared_heads_sha256: _Optional[str] = ..., private_rank: _Optional[int] = ...) -> None: ...

class FileSpec(_message.Message):
    __slots__ = ("name", "size", "sha256")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    name: str
    size: int
    sha256: str
    def __init__(self, name: _Optional[str] = ..., size: _Optional[int] = ..., sha256: _Optional[str] = ...) -> None: ...

class PlanUploadRequest(_message.Message):
    __slots__ = ("id", "files")
    ID_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    id: str
    files: _containers.RepeatedCompositeFieldContainer[FileSpec]
    def __init__(self, id: _Optional[str] = ..., files: _Optional[_Iterable[_Union[FileSpec, _Mapping]]] = ...) -> None: ...

class NeededBlob(_message.Message):
    __slots__ = ("sha256", "offset")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    offset: int
    def __init__(self, sha256: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class PlanUploadResponse(_message.Message):
    __slots__ = ("needed",)
    NEEDED_FIELD_NUMBER: _ClassVar[int]
    needed: _containers.RepeatedCompositeFieldContainer[NeededBlob]
    def __init__(self, needed: _Optional[_Iterable[_Union[NeededBlob, _Mapping]]] = ...) -> None: ...

class UploadHeader(_message.Message):
    __slots__ = ("id", "files", "if_digest", "accept_base")
    ID_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    IF_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ACCEPT_BASE_FIELD_NUMBER: _ClassVar[int]
    id: str
    files: _containers.RepeatedCompositeFieldContainer[FileSpec]
    if_digest: str
    accept_base: bool
    def __init__(self, id: _Optional[str] = ..., files: _Optional[_Iterable[_Union[FileSpec, _Mapping]]] = ..., if_digest: _Optional[str] = ..., accept_base: _Optional[bool] = ...) -> None: ...

class UploadChunk(_message.Message):
    __slots__ = ("sha256", "offset", "data")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    offset: int
    data: bytes
    def __init__(self, sha256: _Optional[str] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class UploadAdapterRequest(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: UploadHeader
    chunk: UploadChunk
    def __init__(self, header: _Optional[_Union[UploadHeader, _Mapping]] = ..., chunk: _Optional[_Union[UploadChunk, _Mapping]] = ...) -> None: ...

class PullAdapterRequest(_message.Message):
    __slots__ = ("id", "hub_id", "folder", "revision", "token", "if_digest", "accept_base")
    ID_FIELD_NUMBER: _ClassVar[int]
    HUB_ID_FIELD_NUMBER: _ClassVar[int]
    FOLDER_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    IF_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ACCEPT_BASE_FIELD_NUMBER: _ClassVar[int]
    id: str
    hub_id: str
    folder: str
    revision: str
    token: str
    if_digest: str
    accept_base: bool
    def __init__(self, id: _Optional[str] = ..., hub_id: _Optional[str] = ..., folder: _Optional[str] = ..., revision: _Optional[str] = ..., token: _Optional[str] = ..., if_digest: _Optional[str] = ..., accept_base: _Optional[bool] = ...) -> None: ...

class PullAdapterResponse(_message.Message):
    __slots__ = ("done_bytes", "total_bytes", "adapter", "left_out")
    DONE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    done_bytes: int
    total_bytes: int
    adapter: Adapter
    left_out: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, done_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ..., adapter: _Optional[_Union[Adapter, _Mapping]] = ..., left_out: _Optional[_Iterable[str]] = ...) -> None: ...

class DownloadAdapterRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class DownloadAdapterResponse(_message.Message):
    __slots__ = ("file", "data")
    FILE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    file: FileSpec
    data: bytes
    def __init__(self, file: _Optional[_Union[FileSpec, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class GetAdapterRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class ListAdaptersRequest(_message.Message):
    __slots__ = ("page_size", "page_token", "id_prefix")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    ID_PREFIX_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    id_prefix: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., id_prefix: _Optional[str] = ...) -> None: ...

class ListAdaptersResponse(_message.Message):
    __slots__ = ("adapters", "next_page_token", "stored_bytes", "staging_bytes")
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    STORED_BYTES_FIELD_NUMBER: _ClassVar[int]
    STAGING_BYTES_FIELD_NUMBER: _ClassVar[int]
    adapters: _containers.RepeatedCompositeFieldContainer[Adapter]
    next_page_token: str
    stored_bytes: int
    staging_bytes: int
    def __init__(self, adapters: _Optional[_Iterable[_Union[Adapter, _Mapping]]] = ..., next_page_token: _Optional[str] = ..., stored_bytes: _Optional[int] = ..., staging_bytes: _Optional[int] = ...) -> None: ...

class ListRevisionsRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class ListRevisionsResponse(_message.Message):
    __slots__ = ("revisions",)
    REVISIONS_FIELD_NUMBER: _ClassVar[int]
    revisions: _containers.RepeatedCompositeFieldContainer[Adapter]
    def __init__(self, revisions: _Optional[_Iterable[_Union[Adapter, _Mapping]]] = ...) -> None: ...

class RollbackAdapterRequest(_message.Message):
    __slots__ = ("id", "digest")
    ID_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    id: str
    digest: str
    def __init__(self, id: _Optional[str] = ..., digest: _Optional[str] = ...) -> None: ...

class PruneRevisionsRequest(_message.Message):
    __slots__ = ("id", "keep")
    ID_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    id: str
    keep: int
    def __init__(self, id: _Optional[str] = ..., keep: _Optional[int] = ...) -> None: ...

class PruneRevisionsResponse(_message.Message):
    __slots__ = ("removed_revisions", "freed_bytes")
    REMOVED_REVISIONS_FIELD_NUMBER: _ClassVar[int]
    FREED_BYTES_FIELD_NUMBER: _ClassVar[int]
    removed_revisions: int
    freed_bytes: int
    def __init__(self, removed_revisions: _Optional[int] = ..., freed_bytes: _Optional[int] = ...) -> None: ...

class DeleteAdapterRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class DeleteAdapterResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LoadAdapterRequest(_message.Message):
    __slots__ = ("id", "pin")
    ID_FIELD_NUMBER: _ClassVar[int]
    PIN_FIELD_NUMBER: _ClassVar[int]
    id: str
    pin: bool
    def __init__(self, id: _Optional[str] = ..., pin: _Optional[bool] = ...) -> None: ...

class UnloadAdapterRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class SetDefaultMedusaRequest(_message.Message):
    __slots__ = ("medusa_id",)
    MEDUSA_ID_FIELD_NUMBER: _ClassVar[int]
    medusa_id: str
    def __init__(self, medusa_id: _Optional[str] = ...) -> None: ...

class SetDefaultMedusaResponse(_message.Message):
    __slots__ = ("medusa_id", "medusa_digest")
    MEDUSA_ID_FIELD_NUMBER: _ClassVar[int]
    MEDUSA_DIGEST_FIELD_NUMBER: _ClassVar[int]
    medusa_id: str
    medusa_digest: str
    def __init__(self, medusa_id: _Optional[str] = ..., medusa_digest: _Optional[str] = ...) -> None: ...

class MergeAdaptersRequest(_message.Message):
    __slots__ = ("loras", "strategy", "density", "majority_sign")
    class Strategy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STRATEGY_UNSPECIFIED: _ClassVar[MergeAdaptersRequest.Strategy]
        TIES: _ClassVar[MergeAdaptersRequest.Strategy]
        DARE_LINEAR: _ClassVar[MergeAdaptersRequest.Strategy]
        DARE_TIES: _ClassVar[MergeAdaptersRequest.Strategy]
    STRATEGY_UNSPECIFIED: MergeAdaptersRequest.Strategy
    TIES: MergeAdaptersRequest.Strategy
    DARE_LINEAR: MergeAdaptersRequest.Strategy
    DARE_TIES: MergeAdaptersRequest.Strategy
    class MajoritySign(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        MAJORITY_SIGN_UNSPECIFIED: _ClassVar[MergeAdaptersRequest.MajoritySign]
        TOTAL: _ClassVar[MergeAdaptersRequest.MajoritySign]
        FREQUENCY: _ClassVar[MergeAdaptersRequest.MajoritySign]
    MAJORITY_SIGN_UNSPECIFIED: MergeAdaptersRequest.MajoritySign
    TOTAL: MergeAdaptersRequest.MajoritySign
    FREQUENCY: MergeAdaptersRequest.MajoritySign
    LORAS_FIELD_NUMBER: _ClassVar[int]
    STRATEGY_FIELD_NUMBER: _ClassVar[int]
    DENSITY_FIELD_NUMBER: _ClassVar[int]
    MAJORITY_SIGN_FIELD_NUMBER: _ClassVar[int]
    loras: _containers.RepeatedCompositeFieldContainer[_generation_pb2.LoraRef]
    strategy: MergeAdaptersRequest.Strategy
    density: float
    majority_sign: MergeAdaptersRequest.MajoritySign
    def __init__(self, loras: _Optional[_Iterable[_Union[_generation_pb2.LoraRef, _Mapping]]] = ..., strategy: _Optional[_Union[MergeAdaptersRequest.Strategy, str]] = ..., density: _Optional[float] = ..., majority_sign: _Optional[_Union[MergeAdaptersRequest.MajoritySign, str]] = ...) -> None: ...
