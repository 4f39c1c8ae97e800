package loader

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Prepare creates the directories of pinned state for a Loader run by another user, who may not
// create any in a BPF file system owned by root: it mounts the file system if there is none,
// creates the pin directory, lets others traverse its parent, and calls give with the pin directory
// while no other process can use the state. Only root can do all of this. It is idempotent. Options.Inherited are
// locks of the state that this process has already; they are closed.
//
// The error matches ErrLocked if another process uses the state.
func Prepare(opts Options, give func(pinDir string) error) (err error) {
	if opts, err = opts.withDefaults(); err != nil {
		return err
	}
	var lock locks
	defer func() { err = errors.Join(err, lock.Close()) }()
	if lock.run, err = takeRunLock(opts); err != nil {
		return err
	}
	mounted, err := mountBPFFS(opts.PinDir)
	if err != nil {
		return err
	}
	if err := lock.makePinDir(opts); err != nil {
		return errors.Join(err, mounted.undo())
	}
	if err := letPass(filepath.Dir(opts.PinDir)); err != nil {
		return err
	}
	return give(opts.PinDir)
}

func (l *locks) makePinDir(opts Options) error {
	if err := os.Mkdir(opts.PinDir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("make pin directory: %w", err)
	}
	var err error
	l.pins, err = takePinLock(opts)
	return err
}

// letPass lets everyone traverse a directory, but not read it: entries below it have their own
// modes, and the kernel creates pins accessible only to their owner (bpf_mkobj_ops of
// kernel/bpf/inode.c).
func letPass(dir string) error {
	info, err := os.Stat(dir)
	if err != nil {
		return err
	}
	const pass = unix.S_IXUSR | unix.S_IXGRP | unix.S_IXOTH
	if info.Mode().Perm()&pass == pass {
		return nil
	}
	if err := os.Chmod(dir, info.Mode()|pass); err != nil {
		return fmt.Errorf("let others pass through %s: %w", dir, err)
	}
	return nil
}
