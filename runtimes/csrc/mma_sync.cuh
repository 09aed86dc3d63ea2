// What kernels on mma.sync read of shared memory, as an instruction's operands.
#pragma once

#include <cstdint>

namespace qvdit {

// Four matrices of 8 rows x 16 bytes; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&registers)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared));
}

}  // namespace qvdit
