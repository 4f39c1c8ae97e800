package lab

import (
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ethtool commands of include/uapi/linux/ethtool.h that x/sys/unix lacks.
const (
	ethtoolSetTxCsum = 0x00000017 // ETHTOOL_STXCSUM
	ethtoolSetGRO    = 0x0000002c // ETHTOOL_SGRO
)

// struct ethtool_value of include/uapi/linux/ethtool.h.
type ethtoolValue struct {
	cmd, data uint32
}

// SetGRO turns generic receive offload of an interface in the current network
// namespace on or off.
func SetGRO(ifname string, on bool) error { return setFeature(ifname, "gro", ethtoolSetGRO, on) }

// SetTxChecksum turns transmit checksum offload on or off. With it off, the
// stack computes every checksum, so that what leaves is what arrives.
func SetTxChecksum(ifname string, on bool) error {
	return setFeature(ifname, "tx-checksumming", ethtoolSetTxCsum, on)
}

func setFeature(ifname, feature string, cmd uint32, on bool) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("ethtool socket: %w", err)
	}
	defer unix.Close(fd)
	value := ethtoolValue{cmd: cmd}
	if on {
		value.data = 1
	}
	var ifr struct {
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte // the rest of struct ifreq's union
	}
	if len(ifname) >= len(ifr.name) {
		return fmt.Errorf("interface name %q: longer than %d bytes", ifname, len(ifr.name)-1)
	}
	copy(ifr.name[:], ifname)
	ifr.data = unsafe.Pointer(&value)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&ifr)))
	runtime.KeepAlive(&value)
	if errno != 0 {
		return fmt.Errorf("set %s %v on %s: %w", feature, on, ifname, errno)
	}
	return nil
}
