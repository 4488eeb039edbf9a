// What a CPU build of torch lacks for CUDA tensors to exist: a device guard, which has nothing to guard, and hooks that
// say there is one device, and where pinned host memory is. Torch asks for the hooks once, while it is imported, so this is loaded before that.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <map>
#include <mutex>
#include <new>

namespace {

const c10::Device kDevice(c10::DeviceType::CUDA, 0);
const c10::Stream kStream(c10::Stream::DEFAULT, kDevice);

// Ordinary host memory that is known as pinned until it is freed.
struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = std::malloc(bytes ? bytes : 1);
    if (!data) {
      throw std::bad_alloc();
    }
    std::lock_guard<std::mutex> lock(mutex());
    blocks()[reinterpret_cast<std::uintptr_t>(data)] = bytes;
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }

  static bool has(const void* data) {
    const auto place = reinterpret_cast<std::uintptr_t>(data);
    std::lock_guard<std::mutex> lock(mutex());
    auto next = blocks().upper_bound(place);
    return next != blocks().begin() && place < std::prev(next)->first + std::prev(next)->second;
  }

 private:
  static void release(void* data) {
    {
      std::lock_guard<std::mutex> lock(mutex());
      blocks().erase(reinterpret_cast<std::uintptr_t>(data));
    }
    std::free(data);
  }
  // Never destroyed: tensors may live until the process has ended.
  static std::map<std::uintptr_t, size_t>& blocks() {
    static auto* found = new std::map<std::uintptr_t, size_t>();
    return *found;
  }
  static std::mutex& mutex() {
    static auto* found = new std::mutex();
    return *found;
  }
};

} // namespace

namespace c10::impl {

// One device, one stream, on which everything has always been done already.
struct PretendedGuard final : DeviceGuardImplInterface {
  DeviceType type() const override { return kDevice.type(); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  Device getDevice() const override { return kDevice; }
  Device exchangeDevice(Device) const override { return kDevice; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}

  Stream getStream(Device) const noexcept override { return kStream; }
  Stream getNewStream(Device, int) const override { return kStream; }
  Stream exchangeStream(Stream) const noexcept override { return kStream; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void recordDataPtrOnStream(const DataPtr&, const Stream&) const override {}

  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
};

C10_REGISTER_GUARD_IMPL(CUDA, PretendedGuard)

} // namespace c10::impl

namespace at {

struct PretendedHooks final : CUDAHooksInterface {
  explicit PretendedHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  bool isPinnedPtr(const void* data) const override { return PinnedMemory::has(data); }
  Allocator* getPinnedMemoryAllocator() const override {
    static auto* memory = new PinnedMemory();
    return memory;
  }
};

C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", PretendedHooks)

} // namespace at
