/* The script of the fake NVML: the test finds it in the library as `fake_nvml` and writes into it. */
#ifndef IC_HW_FAKE_NVML_H
#define IC_HW_FAKE_NVML_H

#define FAKE_GPUS 20

struct fake_nvml {
    int init_rc, n; /* devices */
    int inits, shutdowns, calls;
    struct {
        int rc; /* of every call about this device; 0: each call's own */
        int handle_rc;
        int name_rc, temp_rc, threshold_rc, power_rc, limit_rc, fan_rc, clock_rc, use_rc, mem_rc,
            throttle_rc;
        unsigned temp, slowdown, power_mw, limit_mw, fan, graphics, memory_clock, use, memory_use;
        unsigned long long total, used, reasons;
        int lost_at; /* the call (counted down) at which the device is lost; 0: none */
    } gpu[FAKE_GPUS];
};

#endif
