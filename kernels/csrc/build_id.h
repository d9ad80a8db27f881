// Every library carries what it was built from; build.py looks for this text to see whether it is up to date.
#pragma once
#include "abi.h"

#ifndef TREADLE_BUILD
#define TREADLE_BUILD "unknown"
#endif

int treadle_abi(void) { return TREADLE_ABI; }
const char* treadle_build(void) { return "treadle-build:" TREADLE_BUILD; }
