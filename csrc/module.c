// lserve_ext._C has no functions: importing it loads the library, whose static initialisers register the ops.
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", NULL, -1, NULL, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&module); }
