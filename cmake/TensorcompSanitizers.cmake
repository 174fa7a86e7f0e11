# -DTENSORCOMP_SANITIZE=address,undefined or thread, for everything compiled here (not for torch).
if(TENSORCOMP_SANITIZE)
  if(NOT TENSORCOMP_SANITIZE MATCHES "^(address|undefined|address,undefined|thread)$")
    message(FATAL_ERROR "TENSORCOMP_SANITIZE must be address, undefined, address,undefined or thread, "
                        "got ${TENSORCOMP_SANITIZE}")
  endif()
  # Instrumented code is slow to optimise; asserts stay in.
  set(CMAKE_CXX_FLAGS_RELEASE "-O1")
  add_compile_options(-fsanitize=${TENSORCOMP_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer -g1)
  if(TENSORCOMP_SANITIZE MATCHES "address")
    # Checks by call, or the vector kernels take minutes a file to compile; scopes of locals end with their loops'
    # registers, and null and object sizes are the address sanitizer's own business.
    add_compile_options(-fno-sanitize-address-use-after-scope -fno-sanitize=null,object-size)
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
      add_compile_options("SHELL:--param asan-instrumentation-with-call-threshold=0")
    endif()
  endif()
  add_link_options(-fsanitize=${TENSORCOMP_SANITIZE})
endif()
