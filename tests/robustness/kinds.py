"""The kinds of damage: what every reader must refuse, and what may leave another valid model."""

from tests.robustness import mutations as general
from tests.robustness import plane_mutations as planes
from tests.robustness.mutations import Mutation

MUST_REFUSE: tuple[Mutation, ...] = (
    general.truncate, general.append, general.header_length, general.huge_header, general.key_twice_in_header,
    general.key_twice_in_json, general.offsets, general.swap_shards, general.remove_file, general.folder_for_file,
    general.remove_tensor, general.add_tensor, general.reshape, general.retype, general.not_a_number,
    general.invalid_values, general.index_elsewhere, general.index_of_another_kind, general.config_of_another_kind,
    general.another_size, general.another_depth, general.another_architecture, general.another_quantization,
    planes.scales_of_other_planes, planes.signs_of_other_planes, planes.plane_missing, planes.other_planes_in_config,
    planes.older_version, planes.expert_missing, planes.expert_renumbered, planes.transform_of_another_expert,
    planes.experts_in_16_bits, planes.other_experts_in_config, planes.other_head,
)  # fmt: skip

MAY_PASS: tuple[Mutation, ...] = (
    general.bit_in_header, general.bit_in_data, general.bit_in_json, general.change_config_value,
    general.drop_config_key, general.change_quantization_value, general.exchange_equal_tensors,
    general.extra_key_in_config, planes.exchange_planes, planes.exchange_experts,
)  # fmt: skip
