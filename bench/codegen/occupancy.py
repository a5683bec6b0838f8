"""Theoretical occupancy: how many of the warps that a multiprocessor can hold a kernel lets it hold."""

from __future__ import annotations

from typing import NamedTuple

PARTITIONS = 4  # of a multiprocessor, each with its own registers and warps: an SM's quarters, a CU's SIMDs
LANE_REGISTERS = 512  # of a partition, for each of the 32 or 64 lanes of a warp
REGISTER_GRANULE = 8


class Architecture(NamedTuple):
    """What limits a multiprocessor.

    NVIDIA: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability" (65536 registers, allocated
    by 256 a warp; the CUDA runtime keeps 1 KB of shared memory a block). AMD: LLVM, AMDGPUBaseInfo.cpp (512 vector
    registers, accumulators among them, by 8; 16 barriers, of which a group of one warp needs none). AMD's scalar
    registers are left out.
    """

    warp_size: int
    warps: int  # of a partition
    groups: int  # blocks, or workgroups of more than one warp
    shared: int  # bytes
    reserved: int  # bytes of it that every group takes besides its own


ARCHITECTURES = {
    "sm_80": Architecture(32, 16, 32, 164 * 1024, 1024),
    "sm_90": Architecture(32, 16, 32, 228 * 1024, 1024),
    "sm_100": Architecture(32, 16, 32, 228 * 1024, 1024),
    "gfx90a": Architecture(64, 8, 16, 64 * 1024, 0),
    "gfx942": Architecture(64, 8, 16, 64 * 1024, 0),
}


def occupancy(target: str, registers: int, num_warps: int, shared: int) -> float:
    """The part of a multiprocessor's warps that are resident, from 0 (it does not fit) to 1.

    Args:
        target: a name in ARCHITECTURES.
        registers: of a lane.
        num_warps: of a program.
        shared: bytes of shared memory of a program.
    """
    limits = ARCHITECTURES[target]
    granules = max(1, -(-registers // REGISTER_GRANULE))
    warps = PARTITIONS * min(limits.warps, LANE_REGISTERS // (granules * REGISTER_GRANULE))
    groups = warps // num_warps
    if limits.warp_size == 32 or num_warps > 1:
        groups = min(groups, limits.groups)
    if shared + limits.reserved:
        groups = min(groups, limits.shared // (shared + limits.reserved))
    return groups * num_warps / (PARTITIONS * limits.warps)
