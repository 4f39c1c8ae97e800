/* SPDX-License-Identifier: (BSD-2-Clause OR GPL-2.0-only) */
/* The map config as a variable: programs know the address of its only entry, so reading it needs no
 * lookup. pkg/loader (useConfig) lets this section's instructions refer to the map config.
 */
#pragma once

#include <bpf/bpf_helpers.h>

#include "abi.h"

struct config settings SEC(".data.config");
