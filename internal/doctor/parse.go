package doctor

import (
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// Parsers of /proc. They trust nothing: whatever a text holds, a parser returns a value or an
// error.

var errForm = errors.New("not in the form that proc(5) says")

// parseSoftnet sums the lines of /proc/net/softnet_stat, one per CPU (softnet_seq_show of
// net/core/net-procfs.c): packets, dropped, squeezed, ... in hexadecimal.
func parseSoftnet(text string) (s Softnet, err error) {
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) < 3 {
			return Softnet{}, fmt.Errorf("line %q: %w", line, errForm)
		}
		var n [2]uint64
		for i, f := range fields[1:3] {
			if n[i], err = strconv.ParseUint(f, 16, 64); err != nil {
				return Softnet{}, fmt.Errorf("line %q: %w", line, errForm)
			}
		}
		s.Dropped += n[0]
		s.Squeezed += n[1]
	}
	return s, nil
}

// parseDevMcast reads /proc/net/dev_mcast: index, name, users, global users, address.
func parseDevMcast(text string) (map[string]map[[6]byte]bool, error) {
	all := map[string]map[[6]byte]bool{}
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) != 5 {
			return nil, fmt.Errorf("line %q: %w", line, errForm)
		}
		address, err := hex.DecodeString(fields[4])
		if err != nil {
			return nil, fmt.Errorf("line %q: %w", line, errForm)
		}
		if len(address) != 6 {
			continue // not Ethernet
		}
		if all[fields[1]] == nil {
			all[fields[1]] = map[[6]byte]bool{}
		}
		all[fields[1]][[6]byte(address)] = true
	}
	return all, nil
}

// parseInterrupts returns which interrupts of /proc/interrupts have fired, by number.
func parseInterrupts(text string) map[string]bool {
	busy := map[string]bool{}
	for line := range strings.Lines(text) {
		number, rest, ok := strings.Cut(strings.TrimSpace(line), ":")
		if !ok {
			continue // the header
		}
		for _, field := range strings.Fields(rest) {
			n, err := strconv.ParseUint(field, 10, 64)
			if err != nil {
				break // after the counters, one per CPU
			}
			busy[number] = busy[number] || n > 0
		}
	}
	return busy
}

// parseLimit reads the soft limit of a resource in /proc/PID/limits.
func parseLimit(text, resource string) (uint64, error) {
	for line := range strings.Lines(text) {
		rest, ok := strings.CutPrefix(line, resource)
		fields := strings.Fields(rest)
		if !ok || len(fields) == 0 {
			continue
		}
		if fields[0] == "unlimited" {
			return math.MaxUint64, nil
		}
		n, err := strconv.ParseUint(fields[0], 10, 64)
		if err != nil {
			return 0, fmt.Errorf("line %q: %w", line, errForm)
		}
		return n, nil
	}
	return 0, fmt.Errorf("no limit %q: %w", resource, errForm)
}

// parseCapabilities reads the effective capabilities from /proc/PID/status.
func parseCapabilities(text string) (uint64, error) {
	for line := range strings.Lines(text) {
		if value, ok := strings.CutPrefix(line, "CapEff:"); ok {
			return strconv.ParseUint(strings.TrimSpace(value), 16, 64)
		}
	}
	return 0, fmt.Errorf("no line CapEff: %w", errForm)
}

// parseClockOffset reads the offset of the monotonic clock in /proc/PID/timens_offsets: seconds
// and nanoseconds.
func parseClockOffset(text string) (time.Duration, error) {
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) != 3 || fields[0] != "monotonic" && fields[0] != "1" {
			continue
		}
		s, err := strconv.ParseInt(fields[1], 10, 64)
		ns, err2 := strconv.ParseInt(fields[2], 10, 64)
		if err != nil || err2 != nil || s > math.MaxInt64/int64(time.Second) || s < math.MinInt64/int64(time.Second) {
			return 0, fmt.Errorf("line %q: %w", line, errForm)
		}
		return time.Duration(s)*time.Second + time.Duration(ns), nil
	}
	return 0, nil // a kernel without time namespaces
}
