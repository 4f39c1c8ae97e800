package labtest

import "github.com/cilium/ebpf"

// MapHasEntries says whether the array map or devmap with this id has an entry. A map that no
// longer exists has none.
func MapHasEntries(id ebpf.MapID) bool {
	m, err := ebpf.NewMapFromID(id)
	if err != nil {
		return false
	}
	defer m.Close()
	for row := range m.MaxEntries() {
		if value, err := m.LookupBytes(row); err == nil && value != nil {
			return true
		}
	}
	return false
}
