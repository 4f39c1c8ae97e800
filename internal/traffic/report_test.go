package traffic

import (
	"reflect"
	"testing"
)

// numbers returns the numbers of a struct, and of those in it, in order.
func numbers(v reflect.Value) (all []reflect.Value) {
	for i := range v.NumField() {
		if f := v.Field(i); f.Kind() == reflect.Struct {
			all = append(all, numbers(f)...)
		} else {
			all = append(all, f)
		}
	}
	return all
}

// No counter is left out of a sum.
func TestCountersAdd(t *testing.T) {
	var sum, other Counters
	for i, f := range numbers(reflect.ValueOf(&sum).Elem()) {
		f.SetUint(uint64(i + 1))
	}
	for i, f := range numbers(reflect.ValueOf(&other).Elem()) {
		f.SetUint(uint64(100 * (i + 1)))
	}
	sum.Add(other)
	for i, f := range numbers(reflect.ValueOf(sum)) {
		if want := uint64(101 * (i + 1)); f.Uint() != want {
			t.Errorf("counter %d of %+v is %d, want %d", i, sum, f.Uint(), want)
		}
	}
}
