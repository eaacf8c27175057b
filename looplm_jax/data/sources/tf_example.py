"""Parsing of `tf.train.Example` without TensorFlow: the message type is declared here and read by protobuf."""

import functools
from collections.abc import Mapping
from typing import Any

_PACKAGE = "looplm_jax.example"  # not `tensorflow`, which may be registered in the same process


def parse_example(record: bytes) -> Mapping[str, bytes | None] | None:
    """Returns the features of a serialized example by name.

    The value is the bytes of a feature that holds exactly one bytes value, and None for any other feature. The result
    is None if the record is not an example, or has no features.
    """
    from google.protobuf.message import DecodeError

    example = _example_class()()
    try:
        example.ParseFromString(record)
    except DecodeError:
        return None
    # Unrelated bytes can parse as a message. They are recognized by missing or unnamed features.
    features = example.features.feature
    if not features or "" in features:
        return None
    return {name: _only_value(feature.bytes_list.value) for name, feature in features.items()}


def _only_value(values: Any) -> bytes | None:
    """Returns the only value of a list, or None."""
    return values[0] if len(values) == 1 else None


@functools.cache
def _example_class() -> Any:
    """Returns the message class, with the field numbers and types of TensorFlow's `example.proto` and `feature.proto`.

    Lists of floats and integers are not declared, because they hold no text.
    """
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="looplm_jax/example.proto", package=_PACKAGE, syntax="proto3")

    def declare(message: Any, field: str, number: int, kind: int, label: int = kinds.LABEL_OPTIONAL) -> Any:
        return message.field.add(name=field, number=number, type=kind, label=label)

    byte_list = file.message_type.add(name="BytesList")
    declare(byte_list, "value", 1, kinds.TYPE_BYTES, kinds.LABEL_REPEATED)
    feature = file.message_type.add(name="Feature")
    declare(feature, "bytes_list", 1, kinds.TYPE_MESSAGE).type_name = f".{_PACKAGE}.BytesList"

    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    declare(entry, "key", 1, kinds.TYPE_STRING)
    declare(entry, "value", 2, kinds.TYPE_MESSAGE).type_name = f".{_PACKAGE}.Feature"

    entries = declare(features, "feature", 1, kinds.TYPE_MESSAGE, kinds.LABEL_REPEATED)
    entries.type_name = f".{_PACKAGE}.Features.FeatureEntry"
    declare(
        file.message_type.add(name="Example"), "features", 1, kinds.TYPE_MESSAGE
    ).type_name = f".{_PACKAGE}.Features"

    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.Example"))
