//! The functions of the CUDA driver that load and launch kernels.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

use libloading::Library;

use super::open;

/// `CUresult`, 0 on success.
type Code = c_int;

/// `CUdevice_attribute`
const MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: c_int = 97;
const COMPUTE_CAPABILITY_MAJOR: c_int = 75;
const COMPUTE_CAPABILITY_MINOR: c_int = 76;

/// `CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES`
const MAX_DYNAMIC_SHARED_SIZE_BYTES: c_int = 8;

/// A handle of the driver: a context, a module, a function or a stream.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct Handle(pub *mut c_void);

// SAFETY: the driver allows every thread to use a handle. The handles here are never destroyed.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Handle {
    const NULL: Self = Self(std::ptr::null_mut());
}

/// Numbers of blocks or threads along x and y, and bytes of dynamic shared memory of a block.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Grid {
    pub blocks: [u32; 2],
    pub threads: [u32; 2],
    pub shared_bytes: usize,
}

/// The loaded driver. It is never unloaded.
pub(super) struct Driver {
    get_error_string: unsafe extern "C" fn(Code, *mut *const c_char) -> Code,
    init: unsafe extern "C" fn(c_uint) -> Code,
    device_get: unsafe extern "C" fn(*mut c_int, c_int) -> Code,
    device_get_attribute: unsafe extern "C" fn(*mut c_int, c_int, c_int) -> Code,
    primary_context_retain: unsafe extern "C" fn(*mut Handle, c_int) -> Code,
    context_push: unsafe extern "C" fn(Handle) -> Code,
    context_pop: unsafe extern "C" fn(*mut Handle) -> Code,
    module_load_data: unsafe extern "C" fn(*mut Handle, *const c_void) -> Code,
    module_get_function: unsafe extern "C" fn(*mut Handle, Handle, *const c_char) -> Code,
    function_set_attribute: unsafe extern "C" fn(Handle, c_int, c_int) -> Code,
    launch_kernel: unsafe extern "C" fn(
        Handle,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        Handle,
        *mut *mut c_void,
        *mut *mut c_void,
    ) -> Code,
    event_create: unsafe extern "C" fn(*mut Handle, c_uint) -> Code,
    event_record: unsafe extern "C" fn(Handle, Handle) -> Code,
    event_synchronize: unsafe extern "C" fn(Handle) -> Code,
    event_destroy: unsafe extern "C" fn(Handle) -> Code,
}

/// `CU_EVENT_DISABLE_TIMING`
const EVENT_WITHOUT_TIMES: c_uint = 2;

/// A mark in the work of a stream.
pub(super) struct Event {
    gpu: &'static Gpu,
    event: Handle,
}

impl Event {
    /// Waits for the work before the mark.
    ///
    /// # Errors
    /// The work failed.
    pub(super) fn wait(&self) -> Result<(), String> {
        self.gpu.with_context(|| {
            // SAFETY: the event is alive.
            let code = unsafe { (self.gpu.driver.event_synchronize)(self.event) };
            self.gpu.driver.check("cuEventSynchronize", code)
        })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let destroyed = self.gpu.with_context(|| {
            // SAFETY: the event is alive and not used again.
            let code = unsafe { (self.gpu.driver.event_destroy)(self.event) };
            self.gpu.driver.check("cuEventDestroy", code)
        });
        debug_assert_eq!(destroyed, Ok(()));
    }
}

/// A GPU and the context that it shares with libtorch.
pub(super) struct Gpu {
    pub driver: &'static Driver,
    context: Handle,
    /// Such as `sm_90`.
    pub architecture: String,
    /// Largest dynamic shared memory of a block.
    pub max_shared_bytes: usize,
}

impl Driver {
    /// # Errors
    /// The host has no driver, or the driver does not start.
    pub(super) fn load() -> Result<Self, String> {
        let driver = open("libcuda.so.1".as_ref()).and_then(Self::bind);
        let driver = driver.map_err(|error| format!("there is no CUDA driver: {error}"))?;
        // SAFETY: the driver may be initialised repeatedly.
        driver.check("cuInit", unsafe { (driver.init)(0) })?;
        Ok(driver)
    }

    fn bind(library: &'static Library) -> Result<Self, libloading::Error> {
        // SAFETY: the types of the fields match cuda.h, whose functions keep their types under the
        // names with a version. The library is leaked, so the functions outlive the struct.
        unsafe {
            Ok(Self {
                get_error_string: *library.get(b"cuGetErrorString\0")?,
                init: *library.get(b"cuInit\0")?,
                device_get: *library.get(b"cuDeviceGet\0")?,
                device_get_attribute: *library.get(b"cuDeviceGetAttribute\0")?,
                primary_context_retain: *library.get(b"cuDevicePrimaryCtxRetain\0")?,
                context_push: *library.get(b"cuCtxPushCurrent_v2\0")?,
                context_pop: *library.get(b"cuCtxPopCurrent_v2\0")?,
                module_load_data: *library.get(b"cuModuleLoadData\0")?,
                module_get_function: *library.get(b"cuModuleGetFunction\0")?,
                function_set_attribute: *library.get(b"cuFuncSetAttribute\0")?,
                launch_kernel: *library.get(b"cuLaunchKernel\0")?,
                event_create: *library.get(b"cuEventCreate\0")?,
                event_record: *library.get(b"cuEventRecord\0")?,
                event_synchronize: *library.get(b"cuEventSynchronize\0")?,
                event_destroy: *library.get(b"cuEventDestroy_v2\0")?,
            })
        }
    }

    fn check(&self, call: &str, code: Code) -> Result<(), String> {
        if code == 0 {
            return Ok(());
        }
        let mut text = std::ptr::null();
        // SAFETY: `text` is writable. The driver sets it to a terminated text that it keeps, or to
        // null if it does not know the code.
        let text = unsafe {
            (self.get_error_string)(code, &mut text);
            (!text.is_null()).then(|| CStr::from_ptr(text).to_string_lossy())
        };
        Err(format!("{call} failed: {}", text.unwrap_or_else(|| format!("error {code}").into())))
    }

    /// Retains the context of a GPU for the rest of the process.
    ///
    /// # Errors
    /// The host does not have this GPU.
    pub(super) fn gpu(&'static self, number: usize) -> Result<Gpu, String> {
        let (mut device, mut context) = (0, Handle::NULL);
        // SAFETY: the driver is initialised and writes one integer.
        let code = unsafe { (self.device_get)(&mut device, number as c_int) };
        self.check("cuDeviceGet", code)?;
        // SAFETY: the driver writes one handle of a device that exists.
        let code = unsafe { (self.primary_context_retain)(&mut context, device) };
        self.check("cuDevicePrimaryCtxRetain", code)?;
        let attribute = |attribute: c_int| {
            let mut value = 0;
            // SAFETY: the driver writes one integer.
            let code = unsafe { (self.device_get_attribute)(&mut value, attribute, device) };
            self.check("cuDeviceGetAttribute", code).map(|()| value)
        };
        let [major, minor] = [COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR].map(attribute);
        Ok(Gpu {
            driver: self,
            context,
            architecture: format!("sm_{}{}", major?, minor?),
            max_shared_bytes: attribute(MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?.max(0) as usize,
        })
    }
}

impl Gpu {
    /// Calls the driver with the GPU's context. The context that was current before is current
    /// again afterwards, so that libtorch's choice of a device does not change.
    fn with_context<T>(&self, call: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
        // SAFETY: the context is retained for the rest of the process.
        let code = unsafe { (self.driver.context_push)(self.context) };
        self.driver.check("cuCtxPushCurrent", code)?;
        let result = call();
        let mut popped = Handle::NULL;
        // SAFETY: the context was pushed above, and `popped` is writable.
        let code = unsafe { (self.driver.context_pop)(&mut popped) };
        self.driver.check("cuCtxPopCurrent", code)?;
        result
    }

    /// Marks the work that is queued on `stream` so far.
    ///
    /// # Errors
    /// The driver refuses.
    pub(super) fn record_event(&'static self, stream: Handle) -> Result<Event, String> {
        self.with_context(|| {
            let mut event = Handle::NULL;
            // SAFETY: `event` is writable.
            let code = unsafe { (self.driver.event_create)(&mut event, EVENT_WITHOUT_TIMES) };
            self.driver.check("cuEventCreate", code)?;
            let event = Event { gpu: self, event };
            // SAFETY: the event was created above, and libtorch's streams are never destroyed.
            let code = unsafe { (self.driver.event_record)(event.event, stream) };
            self.driver.check("cuEventRecord", code)?;
            Ok(event)
        })
    }

    /// Loads machine code for the rest of the process, and finds kernels in it.
    ///
    /// # Errors
    /// The code is for another architecture, or a kernel is missing.
    pub(super) fn load(&self, code: &[u8], kernels: &[&CStr]) -> Result<Vec<Handle>, String> {
        self.with_context(|| {
            let mut module = Handle::NULL;
            // SAFETY: `code` is machine code from the compiler, which states its own length.
            let loaded =
                unsafe { (self.driver.module_load_data)(&mut module, code.as_ptr().cast()) };
            self.driver.check("cuModuleLoadData", loaded)?;
            let function = |name: &&CStr| {
                let mut function = Handle::NULL;
                // SAFETY: the module is loaded, and the name is a terminated text.
                let found = unsafe {
                    (self.driver.module_get_function)(&mut function, module, name.as_ptr())
                };
                self.driver.check(&format!("cuModuleGetFunction of {name:?}"), found)?;
                Ok(function)
            };
            kernels.iter().map(function).collect()
        })
    }

    /// Allows blocks of a kernel the largest dynamic shared memory.
    ///
    /// # Errors
    /// The driver refuses.
    pub(super) fn allow_max_shared_bytes(&self, kernel: Handle) -> Result<(), String> {
        let n_bytes = self.max_shared_bytes as c_int;
        self.with_context(|| {
            // SAFETY: the kernel is loaded.
            let code = unsafe {
                (self.driver.function_set_attribute)(kernel, MAX_DYNAMIC_SHARED_SIZE_BYTES, n_bytes)
            };
            self.driver.check("cuFuncSetAttribute", code)
        })
    }

    /// Queues a kernel on a stream of the GPU.
    ///
    /// # Errors
    /// The driver refuses the sizes, or an earlier kernel failed.
    ///
    /// # Safety
    /// `arguments` point to values of the types of the kernel's parameters. The device memory that
    /// the kernel accesses is valid until it has run, and no other stream uses it.
    pub(super) unsafe fn launch(
        &self,
        kernel: Handle,
        grid: Grid,
        stream: Handle,
        arguments: &mut [*mut c_void],
    ) -> Result<(), String> {
        let Grid { blocks, threads, shared_bytes } = grid;
        self.with_context(|| {
            // SAFETY: the kernel is loaded, the stream belongs to the GPU, and the caller
            // guarantees the rest.
            let code = unsafe {
                (self.driver.launch_kernel)(
                    kernel,
                    blocks[0],
                    blocks[1],
                    1,
                    threads[0],
                    threads[1],
                    1,
                    shared_bytes as c_uint,
                    stream,
                    arguments.as_mut_ptr(),
                    std::ptr::null_mut(),
                )
            };
            self.driver.check("cuLaunchKernel", code)
        })
    }
}
