// What kernels on mma.sync do with shared memory: filled in the background, read as an instruction's operands.
#pragma once

#include <cstdint>

namespace qvdit {

// 16 bytes to shared memory, zeros where there are none.
__device__ __forceinline__ void copy_async(uint32_t shared, const void* global, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(there ? 16 : 0));
}

// Four matrices of 8 rows x 16 bytes; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&registers)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared));
}

}  // namespace qvdit
