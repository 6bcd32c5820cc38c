// After the kernels' text: conversions of `Half`, whose bits the text defines, and the way in.
static float to_float(Half value) {
    unsigned sign = (value.bits & 0x8000u) << 16, exponent = value.bits >> 10 & 31u, fraction = value.bits & 1023u;
    if (exponent == 0) return (sign ? -1 : 1) * std::ldexp((float)fraction, -24);
    return __uint_as_float(exponent == 31 ? sign | 0x7f800000u | fraction << 13
                                          : sign | (exponent + 112) << 23 | fraction << 13);
}
static void store(Half* place, float value) {
    unsigned bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u;
    float size = std::fabs(value);
    if (!(size < 65520)) place->bits = (unsigned short)(sign | (std::isnan(value) ? 0x7e00u : 0x7c00u));
    else {
        // In units of the last place of a half of this size, rounded to nearest, ties to even.
        int exponent = size < 6.103515625e-05f ? -14 : std::ilogb(size);
        long units = std::lrint(std::ldexp(size, 10 - exponent));
        place->bits = (unsigned short)(sign | (unsigned)(units + ((long)(exponent + 14) << 10)));
    }
}
extern "C" void launch(const long long* values, unsigned blocks, unsigned width, unsigned height, size_t shared_bytes) {
    gridDim = {blocks, 1, 1};
    blockDim = {width, height, 1};
    shared_memory.assign(shared_bytes / 4, NAN);
    run_all(KERNEL, values);
}
