// Fixed-width integers. NVRTC has no <stdint.h>.
#ifndef HIVTP_INTEGERS_H_
#define HIVTP_INTEGERS_H_

#ifdef __CUDACC_RTC__
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
typedef unsigned long uintptr_t;
#else
#include <stdint.h>
#endif

#endif  // HIVTP_INTEGERS_H_
