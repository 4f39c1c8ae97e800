package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// cpuTime is the time of all CPUs since boot.
type cpuTime struct {
	busy   time.Duration // user, nice, system, irq, softirq
	stolen time.Duration // steal: withheld by a hypervisor
}

// readCPU reads the first line of /proc/stat (proc_stat(5)).
func readCPU() (cpuTime, error) {
	data, err := os.ReadFile("/proc/stat")
	if err != nil {
		return cpuTime{}, err
	}
	return parseCPU(string(data))
}

func parseCPU(stat string) (t cpuTime, err error) {
	const tick = time.Second / 100 // USER_HZ
	line, _, _ := strings.Cut(stat, "\n")
	fields := strings.Fields(line)
	if len(fields) < 9 || fields[0] != "cpu" {
		return t, fmt.Errorf("/proc/stat begins with %q: want the line \"cpu\" and at least eight times", line)
	}
	for i, field := range fields[1:9] {
		n, err := strconv.ParseUint(field, 10, 63)
		if err != nil {
			return t, fmt.Errorf("/proc/stat: %w", err)
		}
		switch d := time.Duration(n) * tick; i {
		case 0, 1, 2, 5, 6:
			t.busy += d
		case 7:
			t.stolen += d
		}
	}
	return t, nil
}
