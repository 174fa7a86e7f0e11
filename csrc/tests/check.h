// As much of a test framework as these tests need: it compiles in no time and is always there.
#pragma once

#include <cstdio>

namespace tensorcomp::test {

inline int& failures() {
  static int count = 0;
  return count;
}

// What the current check is about, printed with its failure.
inline const char*& subject() {
  static const char* text = "";
  return text;
}

inline bool check(bool ok, const char* text, const char* file, int line) {
  if (!ok) {
    std::fprintf(stderr, "%s:%d: failed: %s  %s\n", file, line, text, subject());
    ++failures();
  }
  return ok;
}

// Exit status of a test program.
inline int result(const char* name) {
  std::printf("%s: %s\n", name, failures() == 0 ? "passed" : "FAILED");
  return failures() == 0 ? 0 : 1;
}

}  // namespace tensorcomp::test

#define CHECK(condition) ::tensorcomp::test::check((condition), #condition, __FILE__, __LINE__)
