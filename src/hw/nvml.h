/* NVIDIA's management library (NVML), opened at run time: nothing is linked and no vendor header is needed.
 * That it is not there is normal, said once at debug level. One thread at a time. */
#ifndef IC_HW_NVML_H
#define IC_HW_NVML_H

#include "hw/sensors.h"

/* A source over NVML. `library`: NULL for libnvidia-ml.so.1, else the file to open in its place.
 * IC_NOT_FOUND: no library, no driver or no device (nothing stays open); IC_OOM. */
enum ic_status ic_nvml_source(struct ic_sensor_source *out, const char *library, struct ic_err *err);

/* Bytes that are free on the device at this PCI address ("0000:01:00.0"), other processes' and the driver's
 * own use taken off. False: NVML is not there or does not know. Opens and closes NVML for it (tens of ms).
 * Any thread. */
bool ic_nvml_free_memory(const char *library, const char *pci, uint64_t *bytes);

#define IC_NVML_RETRY_S 30 /* seconds after which a lost device is tried again */

/* The clock by which a lost device's time runs, ic_now_ns() where not set; for tests. */
void ic_nvml_set_clock(const struct ic_sensor_source *s, int64_t (*now_ns)(void));

#endif
