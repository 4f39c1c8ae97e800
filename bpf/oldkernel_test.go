package bpf

import (
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
)

// The verifier checks a global function by itself, with each pointer argument as plain
// memory, and takes plain memory for the key of a map since Linux 6.2 only. A static
// function is checked with its caller, where the key is known to be on the stack.
func TestNoGlobalFunctionUsesAnArgumentAsKey(t *testing.T) {
	checked := 0
	for object, spec := range objects(t) {
		for _, p := range spec.Programs {
			for name, body := range globalFunctions(p) {
				checked++
				if at := keyFromArgument(body); at >= 0 {
					t.Errorf("%s: program %s: global function %s, instruction %d: the key of a map is an argument; make the function static", object, p.Name, name, at)
				}
			}
		}
	}
	if checked == 0 {
		t.Error("found no global functions")
	}
}

// globalFunctions returns the functions of a program that have global linkage, but for the
// program itself.
func globalFunctions(p *ebpf.ProgramSpec) map[string]asm.Instructions {
	bodies := map[string]asm.Instructions{}
	current := ""
	for _, ins := range p.Instructions {
		if fn := btf.FuncMetadata(&ins); fn != nil {
			current = ""
			if fn.Linkage == btf.GlobalFunc && fn.Name != p.Name {
				current = fn.Name
			}
		}
		if current != "" {
			bodies[current] = append(bodies[current], ins)
		}
	}
	return bodies
}

// keyFromArgument returns the first call that hands an argument of the function, or what
// was computed from one, to a map as the key; -1 for none. Registers are followed in the
// order of the instructions, branches aside.
func keyFromArgument(body asm.Instructions) int {
	arguments := map[asm.Register]bool{asm.R1: true, asm.R2: true, asm.R3: true, asm.R4: true, asm.R5: true}
	for i, ins := range body {
		switch class := ins.OpCode.Class(); {
		case ins.IsBuiltinCall():
			switch asm.BuiltinFunc(ins.Constant) {
			case asm.FnMapLookupElem, asm.FnMapUpdateElem, asm.FnMapDeleteElem:
				if arguments[asm.R2] {
					return i
				}
			}
			fallthrough
		case ins.IsFunctionCall():
			for r := asm.R0; r <= asm.R5; r++ {
				delete(arguments, r)
			}
		case class.IsALU() && ins.OpCode.ALUOp() == asm.Mov:
			arguments[ins.Dst] = ins.OpCode.Source() == asm.RegSource && arguments[ins.Src]
		case class.IsLoad():
			delete(arguments, ins.Dst)
		}
	}
	return -1
}
