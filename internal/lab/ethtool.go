package lab

import (
	"fmt"
	"runtime"
	"unsafe"

	"github.com/safchain/ethtool"
	"golang.org/x/sys/unix"
)

// ethtool commands of include/uapi/linux/ethtool.h that x/sys/unix lacks.
const (
	ethtoolSetTxCsum = 0x00000017 // ETHTOOL_STXCSUM
	ethtoolSetGRO    = 0x0000002c // ETHTOOL_SGRO

	ethtoolSetChannels = 0x0000003d // ETHTOOL_SCHANNELS
)

// struct ethtool_value of include/uapi/linux/ethtool.h.
type ethtoolValue struct {
	cmd, data uint32
}

// struct ethtool_channels of include/uapi/linux/ethtool.h.
type ethtoolChannels struct {
	cmd                                      uint32
	_                                        [4]uint32 // the maximums
	rxCount, txCount, otherCount, combineNum uint32
}

// SetChannels sets how many receive and transmit queues an interface in the current
// network namespace uses, as ethtool -L does.
func SetChannels(ifname string, rx, tx int) error {
	value := ethtoolChannels{cmd: ethtoolSetChannels, rxCount: uint32(rx), txCount: uint32(tx)}
	if err := request(ifname, unsafe.Pointer(&value)); err != nil {
		return fmt.Errorf("set %d receive and %d transmit queues on %s: %w", rx, tx, ifname, err)
	}
	return nil
}

// SetGRO turns generic receive offload of an interface in the current network
// namespace on or off.
func SetGRO(ifname string, on bool) error { return setFeature(ifname, "gro", ethtoolSetGRO, on) }

// SetTxChecksum turns transmit checksum offload on or off. With it off, the stack computes every
// checksum, so that packets arrive as sent.
func SetTxChecksum(ifname string, on bool) error {
	return setFeature(ifname, "tx-checksumming", ethtoolSetTxCsum, on)
}

// SetFeature turns a feature of an interface in the current network namespace on or off, by its
// name in ethtool -k.
func SetFeature(ifname, name string, on bool) error {
	e, err := ethtool.NewEthtool()
	if err != nil {
		return fmt.Errorf("ethtool socket: %w", err)
	}
	defer e.Close()
	if err := e.Change(ifname, map[string]bool{name: on}); err != nil {
		return fmt.Errorf("set %s %v on %s: %w", name, on, ifname, err)
	}
	return nil
}

func setFeature(ifname, feature string, cmd uint32, on bool) error {
	value := ethtoolValue{cmd: cmd}
	if on {
		value.data = 1
	}
	if err := request(ifname, unsafe.Pointer(&value)); err != nil {
		return fmt.Errorf("set %s %v on %s: %w", feature, on, ifname, err)
	}
	return nil
}

// request makes the request with the struct at data.
func request(ifname string, data unsafe.Pointer) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("ethtool socket: %w", err)
	}
	defer unix.Close(fd)
	var ifr struct {
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte // the rest of struct ifreq's union
	}
	if len(ifname) >= len(ifr.name) {
		return fmt.Errorf("interface name %q: longer than %d bytes", ifname, len(ifr.name)-1)
	}
	copy(ifr.name[:], ifname)
	ifr.data = data
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&ifr)))
	runtime.KeepAlive(data)
	if errno != 0 {
		return errno
	}
	return nil
}
