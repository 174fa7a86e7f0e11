# -DTENSORCOMP_SANITIZE=address,undefined or thread, for everything compiled here (not for torch).
if(TENSORCOMP_SANITIZE)
  if(NOT TENSORCOMP_SANITIZE MATCHES "^(address|undefined|address,undefined|thread)$")
    message(FATAL_ERROR "TENSORCOMP_SANITIZE must be address, undefined, address,undefined or thread, "
                        "got ${TENSORCOMP_SANITIZE}")
  endif()
  # Instrumented code is slow to optimise; asserts stay in.
  set(CMAKE_CXX_FLAGS_RELEASE "-O1")
  add_compile_options(-fsanitize=${TENSORCOMP_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer -g1)
  add_link_options(-fsanitize=${TENSORCOMP_SANITIZE})
endif()
