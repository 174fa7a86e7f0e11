// Functions that compile for the host, for the device, and where there is no CUDA at all.
#pragma once

#ifdef __CUDACC__
#define TC_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define TC_HOST_DEVICE inline
#endif
