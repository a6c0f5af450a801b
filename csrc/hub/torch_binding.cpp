// SPDX-License-Identifier: Apache-2.0
// Lets Python import the library as a module without contents, which registers its operators. The
// builder of the Hugging Face hub sets the name, TORCH_EXTENSION_NAME.
#include <Python.h>

#define KANDINSKY_TEXT(name) #name
#define KANDINSKY_MODULE(name)                          \
  PyMODINIT_FUNC PyInit_##name() {                      \
    static PyModuleDef module = {PyModuleDef_HEAD_INIT, \
                                 KANDINSKY_TEXT(name),  \
                                 nullptr,               \
                                 0,                     \
                                 nullptr,               \
                                 nullptr,               \
                                 nullptr,               \
                                 nullptr,               \
                                 nullptr};              \
    return PyModule_Create(&module);                    \
  }
#define KANDINSKY_EXPANDED(name) KANDINSKY_MODULE(name)

KANDINSKY_EXPANDED(TORCH_EXTENSION_NAME)
